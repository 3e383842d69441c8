"""Completion in real shells, and its words beside what the parsers know."""

import argparse
import importlib
import io
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.__main__ import COMMANDS, main
from imagereward_jax.completion import flags_of
from imagereward_jax.shipped import shipped_files

RECIPES = {path.stem for path in shipped_files("configs")}


@pytest.fixture(scope="module")
def scripts():
    found = {}
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", text := io.StringIO())
            assert main(["--completion", shell]) == 0
        found[shell] = text.getvalue()
    return found


def complete(script, *words):
    """What bash offers at the end of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _imagereward; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-uc", f"{script}\n{ask}"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_in_bash(scripts):
    bash = scripts["bash"]
    assert complete(bash, "imagereward", "") == {*COMMANDS, "--help", "--version", "--completion"}
    assert complete(bash, "imagereward", "ge") == {"generate"}
    assert complete(bash, "imagereward", "train", "--config", "") == RECIPES
    assert complete(bash, "imagereward", "train", "--config", "refl_ti") == {
        "refl_tiny", "refl_tiny_lora", "refl_tiny_mix"
    }  # fmt: skip
    assert complete(bash, "imagereward", "plan", "--config", "=", "drtune_t") == {"drtune_tiny"}
    assert complete(bash, "imagereward", "plan", "--config", "=") == RECIPES
    assert complete(bash, "imagereward", "score", "--on") == {"--on-error"}
    assert complete(bash, "imagereward", "export", "--") == {"--help", "--step", "--overwrite"}
    assert complete(bash, "imagereward", "convert", "to") == {"to-diffusers"}
    assert complete(bash, "imagereward", "--completion", "") == {"bash", "zsh", "fish"}
    assert complete(bash, "imagereward", "score", "image") == set()  # then bash completes files


def test_flags_are_those_of_the_parsers(monkeypatch):
    """Of every command that has an `argparse` parser all long flags but --help, and `--config` of `plan`."""
    known = {}

    def spy(self, args=None, namespace=None):
        known.update(dict.fromkeys(self._option_string_actions))
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", spy)
    expected = {}
    for name in COMMANDS:
        module = importlib.import_module(f"imagereward_jax.{name}") if name != "convert" else None
        if name != "train" and hasattr(module, "parse_args"):
            known.clear()
            with pytest.raises(SystemExit):
                module.parse_args([])
            expected[name] = {flag for flag in known if flag.startswith("--")} - {"--help"}
    monkeypatch.undo()
    expected["plan"].add("--config")
    expected["train"] = {
        "--config", "--workdir", "--distributed", "--coordinator", "--num-processes", "--process-id"
    }  # fmt: skip
    assert {name: set(flags_of(name)) - {"--help"} for name in expected} == expected
    assert len(expected) > 6


PRESSED = """\
import os, pty, sys
shell, script, *lines = sys.argv[1:]
process, terminal = pty.fork()
if not process:
    os.environ["TERM"] = "dumb"
    os.execvp(shell, [shell, *({"bash": ["--norc"], "zsh": ["-f"]}[shell]), "-i"])
def read(end):
    text = b""
    while end not in text:
        text += os.read(terminal, 4096)
    return text.decode().rpartition(end.decode())[0]
os.write(terminal, f"PS1=; source '{script}'; echo REA''DY\\n".encode())
read(b"READY")
for line in lines:
    os.write(terminal, f"imagereward {line}\\t; echo DO''NE\\n".encode())
    print(read(b"DONE").rpartition("SAID:")[2].strip())
os.write(terminal, b"exit\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_line_is_completed_by_tab(scripts, shell, tmp_path):
    """In an interactive shell without start-up files: names of commands, recipes, flags and files."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    # After Enter `imagereward` says what Tab has made of its arguments.
    (tmp_path / "script").write_text(scripts[shell] + "imagereward() { echo SAID: $@; }\n")
    (tmp_path / "an_image.png").touch()
    expected = {
        "gen": "generate",
        "train --config drtune_t": "train --config drtune_tiny",
        "train --config=drtune_t": "train --config=drtune_tiny",
        "score --on": "score --on-error",
        "convert to": "convert to-diffusers",
        "score an_": "score an_image.png",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRESSED, shell, "./script", *expected],
        cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(expected.values())


def complete_in_fish(script, line):
    """What fish offers at the end of a line, without what it says of it."""
    ask = ["fish", "--no-config", "-c", "source; complete -C $argv[1]", line]
    done = subprocess.run(ask, input=script, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {offer.split("\t")[0] for offer in done.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_in_fish(scripts):
    fish = scripts["fish"]
    assert set(COMMANDS) <= complete_in_fish(fish, "imagereward ")
    assert complete_in_fish(fish, "imagereward ge") == {"generate"}
    assert complete_in_fish(fish, "imagereward train --config ") >= RECIPES
    assert complete_in_fish(fish, "imagereward plan --config=drtune_t") == {"--config=drtune_tiny"}
    assert complete_in_fish(fish, "imagereward score --on") == {"--on-error"}
    assert complete_in_fish(fish, "imagereward convert to") == {"to-diffusers"}
    assert complete_in_fish(fish, "imagereward --completion ") == {"bash", "zsh", "fish"}


def test_fish_gets_every_command_and_flag(scripts):
    lines = scripts["fish"].splitlines()
    for name in COMMANDS:
        assert sum(f" -a {name} " in line for line in lines) == 1
        for flag in flags_of(name):
            own = [line for line in lines if f"from {name}'" in line and line.split(" -l ")[-1].split()[0] == flag[2:]]
            assert len(own) == 1, (name, flag)
    assert all(line.replace(r"\'", "").count("'") % 2 == 0 for line in lines)


def test_an_unknown_shell_is_refused(capsys):
    assert main(["--completion", "bsh"]) == 2
    assert capsys.readouterr().err == (
        "error: --completion 'bsh' (did you mean 'bash'?): expected one of bash, zsh, fish\n"
    )
    assert main(["--completion"]) == 2
