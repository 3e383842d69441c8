"""The README's commands, typed as they stand, do what it says."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagereward_jax as RM
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.generate import main

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_draws_what_it_says(tmp_path, monkeypatch):
    """Its command as it stands: the checker finds all four words in at least 3 of the 4 images."""
    (command,) = re.findall(r"^python -m imagereward_jax\.generate (.+)$", README.read_text(), re.MULTILINE)
    arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    prompt, out = (arguments[arguments.index(flag) + 1] for flag in ("--prompt", "--out"))
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / out).iterdir())]
    assert len(images) == 4
    assert sum(fully_right(prompt, image) for image in images) >= 3


def test_the_readme_trains_from_python(tmp_path, monkeypatch, shortened):
    """Its block, in two steps and on a smaller model, leaves a model that opens."""
    for package in ("orbax.checkpoint", "grain", "ml_collections", "matplotlib", "tensorboard"):
        pytest.importorskip(package)
    section = README.read_text().split("## From Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(shortened(block, '"steps": 30'), {"__name__": "readme"})
    RM.load_pipeline(tmp_path / "redness")
