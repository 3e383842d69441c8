"""The README's commands, typed as they stand, do what it says."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagereward_jax as RM
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.generate import main
from imagereward_jax.rewards.registry import open_reward

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
    for package in ("orbax.checkpoint", "grain", "ml_collections", "tensorboard"):
        pytest.importorskip(package)
    section = README.read_text().split("## From Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(shortened(block, '"steps": 30'), {"__name__": "readme"})
    RM.load_pipeline(tmp_path / "redness")


def test_the_rewards_of_the_readme_score(tmp_path, monkeypatch):
    """Its module as it stands, by the names that its text gives."""
    section = README.read_text().split("## A reward of your own")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "=jax:my_rewards:warmth" in section and "`my_rewards:contrast`" in section
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    warmth, contrast = open_reward("jax:my_rewards:warmth"), open_reward("my_rewards:contrast")
    red, blue = (images[..., channel].mean((1, 2)) / 255 for channel in (0, 2))
    np.testing.assert_allclose(warmth.score("a prompt", list(images)), red - blue, atol=1e-6)
    np.testing.assert_allclose(contrast.score("a prompt", list(images)), images.std((1, 2, 3)) / 255, atol=1e-6)
    assert warmth.differentiable and not contrast.differentiable
    sys.modules.pop("my_rewards")
