"""Completion in a real bash, and its words beside what the parsers know."""

import argparse
import importlib
import io
import shutil
import subprocess

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


def test_zsh_and_fish(scripts):
    """zsh runs the script of bash; fish gets every command, recipe and flag."""
    assert scripts["zsh"].endswith(scripts["bash"]) and scripts["zsh"].startswith("autoload -U +X bashcompinit")
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
