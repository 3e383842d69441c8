"""The command `imagereward`: it starts the commands of the package, which find recipes by name and explain fields."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.__main__ import COMMANDS, main
from imagereward_jax.config_help import comments, describe
from imagereward_jax.methods.base import find_method
from imagereward_jax.recipes import default_config, recipe_beside, sections_of
from imagereward_jax.sections.run import Run
from imagereward_jax.train import parse_flags

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def as_before():
    """A command that `imagereward` starts handles Ctrl-C as a process of its own would."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, handler)
    signal.set_wakeup_fd(-1)
    sys.unraisablehook = hook


def said(capsys, *argv):
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_what_there_is(capsys):
    """Help names every command, `recipes` and `convert` every file, each with the first line of what it says."""
    for argv in ((), ("--help",)):
        status, text, _ = said(capsys, *argv)
        assert status == 0 and all(re.search(rf"^  {name} +\S", text, re.MULTILINE) for name in COMMANDS)
    status, text, _ = said(capsys, "recipes")
    assert status == 0 and [line.split()[0] for line in text.splitlines()] == [path.stem for path in RECIPES]
    assert "ReFL on the built-in tiny model" in text
    scripts = [path.stem.replace("_", "-") for path in sorted((ROOT / "convert").glob("*.py"))]
    assert [line.split()[0] for line in said(capsys, "convert")[1].splitlines()[2:]] == scripts
    assert re.fullmatch(r"imagereward-jax \d+\.\d+\.\d+\n", said(capsys, "--version")[1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?): one of train,"),
        (["convert", "single-fil"], "unknown conversion 'single-fil' (did you mean 'single-file'?): one of "),
        (["train", "--config", "refl_tinny"], "no such file, nor a recipe of this package (did you mean 'refl_tiny'?)"),
        (["train", "--config=configs/refl_tinny.py"], "no such file, nor a recipe"),
        (["train", "--config"], "no such file"),
        (["train"], "--config is missing; usage: imagereward train --config"),
        (["score"], "usage: imagereward score "),
        (["convert", "merge-lora"], "usage: merge_lora.py "),
    ],
)
def test_mistakes_are_bad_input(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["imagereward"])
    status, _, error = said(capsys, *argv)
    assert status == 2 and message in error


@pytest.mark.parametrize("argv", [["--config=refl_tiny"], ["--config", "refl_tiny"]])
def test_a_recipe_is_found_by_its_name_anywhere(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    config, workdir, _ = parse_flags(["train", "--config.steps=3", *argv])
    assert config.method.stop_min == 5 and config.steps == 3 and workdir == Path("runs/refl_tiny")
    (tmp_path / "refl_tiny").write_text((ROOT / "configs/draft_tiny.py").read_text())
    assert parse_flags(["train", *argv])[0].method.name == "reward_gradient", "a file of that name comes first"


def fields_of(config, prefix="config"):
    for name in config:
        value = config.get(name)
        if hasattr(value, "items") and len(value) and name not in ("architecture", "terms", "judges"):
            yield from fields_of(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


@pytest.mark.parametrize("recipe", ["refl_tiny", "shapes_pretrain", "imagereward_tiny"])
def test_help_with_a_recipe_explains_its_every_field(capsys, monkeypatch, recipe):
    """Each once, with its value there; what is given on the command line shows."""
    monkeypatch.setattr(sys, "argv", ["imagereward"])
    status, text, _ = said(capsys, "train", "--config", recipe, "--config.steps=7", "--help")
    assert status == 0 and "--config.steps=7\n" in text
    shown = re.findall(r"^--(config[\w.]*)=", text, re.MULTILINE)
    assert sorted(shown) == sorted(fields_of(recipe_beside(ROOT / "configs/x", recipe)))
    if recipe == "refl_tiny":
        assert "--config.method.stop_min=5\n" in text
        assert re.search(r"--config.optimizer.b1=0.9\n +decay of the gradient's average; at least 0, below 1\n", text)
        assert re.search(r"--config.ema_decay=0.98\n +> 0 averages the weights,", text)


def test_comments_are_those_of_the_source():
    """Behind a field, above it over several lines, and of the class that a section extends."""
    assert comments(Run)["accumulation"] == "rounds that a batch is split into: less memory, same gradient"
    assert comments(Run)["max_skipped"].startswith("updates skipped in a row (loss, gradient or result not finite)")
    found = comments(find_method("flow_grpo").Config)
    assert (
        found["penalty"].startswith("To the weights that training starts from:")
        and "times the step's" in found["penalty"]
    )
    assert found["advantage_clip"] == "advantages count within +- this" and found["group_size"].startswith(
        "images of a prompt that are compared"
    )


def test_every_method_s_config_can_be_explained():
    for path in (ROOT / "imagereward_jax/methods").glob("*.py"):
        if "class Config(" in path.read_text():
            config = default_config(path.stem)
            for section in sections_of(config):
                assert all(comments(section).get(name) for name in section.bounds()), section
            shown = re.findall(r"^--(config[\w.]*)=", describe(config), re.MULTILINE)
            assert sorted(shown) == sorted(fields_of(config)), path.stem


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "imagereward_jax", "recipes"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_none_is_read_where_it_is_allowed():
    """A sampler that the recipe sets goes back to the model's own; a prompt keeps the word."""
    argv = ["train", "--config", "ddpo_tiny", "--config.eval.sampler=None", "--config.method.negative_prompt=None"]
    config, *_ = parse_flags(argv)
    assert config.eval.sampler is None
    assert config.method.negative_prompt == "None"
