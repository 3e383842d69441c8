"""Compiled programs are kept between processes, and nothing depends on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from imagereward_jax import compilation_cache, evaluate, generate, score, train

pytestmark = pytest.mark.usefixtures("real_compilation")

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from imagereward_jax.compilation_cache import use_compilation_cache

counts = {}
jax.monitoring.register_event_listener(lambda name, **_: counts.update({name: counts.get(name, 0) + 1}))
folder = use_compilation_cache(sys.argv[1] == "on")
result = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.linspace(0.0, 1.0, 12).reshape(3, 4))
hits = counts.get("/jax/compilation_cache/cache_hits", 0)
print(json.dumps({"folder": folder and str(folder), "hits": hits, "result": result.tolist()}))
"""


def start(enabled="on", **variables):
    """(what a process that compiles one small program says, its stderr)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "IMAGEREWARD_"))}
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, enabled],
        env={**kept, **settings, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_second_process_compiles_nothing_and_gives_the_same_numbers(tmp_path):
    first, _ = start(XDG_CACHE_HOME=tmp_path)
    assert first["hits"] == 0
    folder = Path(first["folder"])
    assert folder.parent == tmp_path / "imagereward_jax" / "compiled"
    programs = sorted(path.name for path in folder.iterdir() if path.name.startswith("jit_"))
    assert programs
    second, said = start(XDG_CACHE_HOME=tmp_path)
    assert second["hits"] >= 1
    assert second["result"] == first["result"]
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("jit_")) == programs
    assert said == ""


@pytest.mark.parametrize("how", ["argument", "variable", "jax"])
def test_off_leaves_no_folder(tmp_path, how):
    variables = {"variable": {"IMAGEREWARD_JAX_CACHE": "off"}, "jax": {"JAX_ENABLE_COMPILATION_CACHE": "false"}}
    got, _ = start("off" if how == "argument" else "on", HOME=tmp_path, XDG_CACHE_HOME="", **variables.get(how, {}))
    assert got["folder"] is None
    assert not list(tmp_path.rglob("*"))


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / "file").write_text("")
    got, said = start(IMAGEREWARD_JAX_CACHE=tmp_path / "file" / "cache")
    assert got["folder"] is None and got["hits"] == 0
    assert said.count("warning: compiled programs are not kept for the next start") == len(said.splitlines()) == 1
    assert "set IMAGEREWARD_JAX_CACHE to a folder that can be written, or to off" in said


def test_the_users_own_cache_is_kept(tmp_path):
    got, _ = start("off", JAX_COMPILATION_CACHE_DIR=tmp_path / "own", IMAGEREWARD_JAX_CACHE=tmp_path / "ours")
    assert got["folder"] == str(tmp_path / "own")
    assert list((tmp_path / "own").glob("jit_*")) and not (tmp_path / "ours").exists()


def test_machines_with_other_cpus_have_other_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEREWARD_JAX_CACHE", str(tmp_path))
    here = compilation_cache.default_folder()
    monkeypatch.setattr(compilation_cache, "_cpu", lambda: "flags: avx512 and others")
    assert compilation_cache.default_folder() != here


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(
    ("command", "work", "argv", "off"),
    [
        (score, "score_files", ["--prompt", "a cat", "1.png"], "--no-compilation-cache"),
        (generate, "generate", ["--model", "tiny-shapes", "--prompt", "a", "--out", "x"], "--no-compilation-cache"),
        (evaluate, "evaluate", ["--model", "random", "--data", "shapes:held_out"], "--no-compilation-cache"),
        (
            train,
            "imagereward_jax.training.loop.train",
            ["", "--config=configs/refl_tiny.py"],
            "--config.compilation_cache=False",
        ),
    ],
)
def test_commands_turn_it_on_unless_told_not_to(tmp_path, monkeypatch, command, work, argv, off, flag):
    """The cache's folder, while a command is at work."""
    seen = []

    class Enough(Exception):
        exit_status = 2

    def stop(*_, **__):
        seen.append(jax.config.jax_compilation_cache_dir)
        raise Enough

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("IMAGEREWARD_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(work if "." in work else f"{command.__name__}.{work}", stop)
    before = jax.config.jax_compilation_cache_dir
    assert before is None
    try:
        assert command.main(argv if flag else [*argv, off]) == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert seen == [str(compilation_cache.default_folder()) if flag else None]
