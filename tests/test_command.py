"""Ctrl-C ends any command, at any moment, with one line and status 130; an absent package of an extra, with 2."""

import ast
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax import score
from imagereward_jax.command import EXTRAS, command
from imagereward_jax.training.interruptions import catch_signals

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
SMALL = {
    f"imagereward_jax.{name}"
    for name in ("command", "terminal", "compilation_cache", "config", "distributed", "shipped")
}
# Command to the function that does its work and arguments.
COMMANDS = {
    "score": ("score_files", ["--prompt", "a cat", "1.png"]),
    "evaluate": ("evaluate", ["--model", "random", "--data", "shapes:held_out"]),
    "generate": ("generate", ["--model", "tiny-shapes", "--prompt", "a", "--out", "x"]),
    "plan": ("use_virtual_devices", ["--topology", "cpu:1"]),
    "train": ("run", ["", f"--config={ROOT}/configs/refl_tiny.py", "--config.compilation_cache=False"]),
    "from_diffusers": ("convert", ["a", "b"]),
    "to_diffusers": ("convert", ["a", "b"]),
    "merge_lora": ("merge", ["a", "b", "c"]),
    "tiny_shapes": ("pack", ["a", "b"]),
    "shapes_groups": ("write", ["out", "tiny-shapes"]),
    "imagereward": ("parse_args", ["a", "b"]),
    "shapes_subject": ("parse_args", ["a"]),
    "single_file": ("convert", ["a", "b"]),
    "export": ("parse_args", ["a", "b"]),
    "push": ("find_export", ["a", "b/c"]),
    "demo": ("parse_args", []),
    "compare": ("parse_args", ["a", "-o", "b.html"]),
    "serve": ("serve", ["--reward", "random"]),
    "integrations.__main__": ("install", ["comfyui", "a"]),
    "__main__": ("shipped_files", ["recipes"]),
}


def module_of(name):
    path = ROOT / f"convert/{name}.py"
    if not path.exists():
        return importlib.import_module(f"imagereward_jax.{name}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interrupt(*_, **__):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_one_line_and_130(name, monkeypatch, capsys):
    work, argv = COMMANDS[name]
    module = module_of(name)
    monkeypatch.setattr(module, work, interrupt)
    assert module.main(argv) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_package_that_is_not_installed_names_its_extra(monkeypatch, capsys):
    """Every package of an extra in pyproject.toml has its line; any other absence is a fault and stays one."""
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    monkeypatch.delitem(sys.modules, "imagereward_jax.recipes", raising=False)
    module = module_of("train")
    assert module.main(COMMANDS["train"][1]) == 2
    said = capsys.readouterr().err
    assert said == "error: this needs ml_collections: pip install 'imagereward-jax[train]'\n"

    def absent(*_):
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    assert command(absent)([]) == 1
    assert re.match("error: not foreseen: ModuleNotFoundError: .*'nowhere'", capsys.readouterr().err)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"orbax-checkpoint": "orbax", "absl-py": "absl", "tensorflow-cpu": "tensorflow"}
    for extra in ("train", "tfds", "convert", "demo", "quantization", "wandb"):
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0]
            assert imported.get(name, name.replace("-", "_")) in EXTRAS, requirement


def test_every_script_is_such_a_command():
    """A module that calls its `main` as a script has the decorator on it, and imports nothing large before."""
    scripts = [*(ROOT / "imagereward_jax").rglob("*.py"), *(ROOT / "convert").glob("*.py")]
    scripts = [path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    package = ROOT / "imagereward_jax"
    scripts = {
        ".".join(path.relative_to(package).with_suffix("").parts) if path.is_relative_to(package) else path.stem: path
        for path in scripts
    }
    assert scripts.keys() == COMMANDS.keys()
    for path in scripts.values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert [decorator.id for decorator in main.decorator_list] == ["command"], path
        modules = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names} <= SMALL, path


def test_score_says_that_its_rows_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "score_many", interrupt)
    assert score.main(["--input", "rows.csv", "--output", str(tmp_path / "out.csv")]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues from here\n"


def test_the_loop_notes_the_first_ctrl_c_and_the_second_interrupts():
    with pytest.raises(KeyboardInterrupt, match="continues from the latest checkpoint"), catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


SCRIPT = """
import _imp, hashlib, importlib.machinery, os, signal, sys, threading, time
from imagereward_jax.command import command

class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

real = _imp.exec_dynamic

def start_extension(module):
    _imp.exec_dynamic = real
    signal.raise_signal(signal.SIGINT)
    print("started")

@command
def main(argv=None):
    try:
        if sys.argv[1] == "destructor":
            Dropped()
        elif sys.argv[1] == "extension":
            _imp.exec_dynamic = start_extension
            importlib.machinery.ExtensionFileLoader("name", "path").exec_module(None)
        else:
            for delay in (0.1, 0.3) if sys.argv[1] == "compiler" else (0.1, 1.5):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        time.sleep(20)
    finally:
        signal.raise_signal(signal.SIGINT)
        print("cleaned")

main()
"""


@pytest.mark.parametrize(
    ("where", "printed"),
    [("destructor", "cleaned\n"), ("extension", "started\ncleaned\n"), ("compiler", ""), ("busy compiler", "")],
)
def test_places_that_an_exception_does_not_leave(where, printed):
    """Python drops exceptions of destructors, modules in C++ crash: there the interruption comes a little later. In a
    compiler none is raised: a thread says so after a second, and another Ctrl-C ends the process. Elsewhere it does not
    disturb what cleans up."""
    command = [sys.executable, "-c", SCRIPT, where]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=15)
    said = "stopping when what is compiled or computed now is done; Ctrl-C again ends at once\n"
    said = said if where == "busy compiler" else ""
    assert (done.returncode, done.stdout, done.stderr) == (130, printed, f"{said}interrupted\n")


@pytest.mark.parametrize(
    "start",
    [
        "import runpy; runpy.run_module('imagereward_jax', run_name='__main__')",
        "from imagereward_jax.__main__ import main; sys.exit(main())",
    ],
)
def test_an_interrupted_command_skips_pythons_own_end(start):
    """In which threads of a compiler crash: of `python -m imagereward_jax` as of the script `imagereward`."""
    program = f"""
import atexit, signal, sys
import imagereward_jax.score
from imagereward_jax.command import command
atexit.register(print, "at exit")
imagereward_jax.score.main = command(lambda argv: signal.raise_signal(signal.SIGINT))
sys.argv = ["imagereward", "score"]
{start}
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


IN_BACKGROUND = """
import hashlib, os, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
from imagereward_jax.command import command
from imagereward_jax.terminal import say
from imagereward_jax.training.interruptions import catch_signals

@command
def main(argv=None):
    with catch_signals(lambda: say("answered")) as caught:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**6)
        say("computed")
    say(caught == [signal.SIGTERM])

main()
"""


def test_a_job_in_the_background_is_answered_as_well():
    """A shell starts it with Ctrl-C ignored; SIGTERM is answered while a compiler lets no handler run."""
    done = subprocess.run([sys.executable, "-c", IN_BACKGROUND], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "answered\ncomputed\nTrue\n", "")


@pytest.mark.slow
def test_two_ctrl_c_end_generate_while_it_compiles(tmp_path):
    """No crash of jax's threads at Python's end, and no wait for the compiler, which no signal interrupts."""
    flags = ["--model", "tiny-shapes", "--prompt", "a", "--out", str(tmp_path / "out"), "--num-images", "500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "imagereward_jax.generate", *flags],
        env={**ENVIRONMENT, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().startswith("ddim")
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and printed == ""
    assert errors.endswith("interrupted\n") and "Traceback" not in errors
    assert os.listdir(tmp_path / "out") == []
