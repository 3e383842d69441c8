"""What pages say about the result of their blocks; that the blocks run at all is tests/test_documentation.py."""

import re
import shlex
import sys

import numpy as np
from pages import ROOT, blocks_of
from PIL import Image

from imagereward_jax.data.shapes import fully_right
from imagereward_jax.generate import main
from imagereward_jax.rewards.registry import open_reward

DOCS = ROOT / "docs"


def test_the_page_draws_what_it_says(tmp_path, monkeypatch):
    """Its command as it stands: the checker finds all four words in at least 3 of the 4 images."""
    (command,) = re.findall(r"^imagereward generate (.+)$", (DOCS / "howto/generate.md").read_text(), re.MULTILINE)
    arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    prompt, out = (arguments[arguments.index(flag) + 1] for flag in ("--prompt", "--out"))
    images = [np.asarray(Image.open(path)) for path in sorted((tmp_path / out).iterdir())]
    assert len(images) == 4
    assert sum(fully_right(prompt, image) for image in images) >= 3


def test_the_rewards_of_the_page_score(tmp_path, monkeypatch):
    """Its module as it stands, by the names that its text gives."""
    page = DOCS / "tutorials/own_reward.md"
    (code,) = (block.code for block in blocks_of(page) if block.title == "my_rewards.py")
    assert "=jax:my_rewards:warmth" in page.read_text() and "=my_rewards:contrast" in page.read_text()
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
