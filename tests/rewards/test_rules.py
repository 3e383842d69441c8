"""Rewards by rule: JPEG size both ways, and a user's function."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.rewards.registry import available_rewards, open_reward
from imagereward_jax.rewards.rules import is_rule


@pytest.fixture
def images():
    flat = np.full((16, 24, 3), 130, np.uint8)
    noisy = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    return np.stack([flat, noisy])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, importable as `my_rewards`."""
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(images, prompts):\n"
        "    return images.mean((1, 2, 3)) + [len(prompt) for prompt in prompts]\n"
        "def too_few(images, prompts):\n"
        "    return [1.0]\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def test_jpeg_size_is_that_of_the_file_both_ways(images):
    """In thousands of bytes at quality 95, as DDPO has it."""
    compressible, incompressible = open_reward("jpeg-compressibility"), open_reward("jpeg-incompressibility")
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    np.testing.assert_allclose(incompressible.score("x", list(images)), sizes)
    np.testing.assert_allclose(compressible.score("x", list(images)), np.negative(sizes))
    np.testing.assert_allclose(incompressible.score_arrays(images / np.float32(255), ["x", "y"]), sizes)
    assert compressible.inference_rank("x", list(images))[0] == [1, 2]
    assert incompressible.inference_rank("x", list(images))[0] == [2, 1]


def test_commands_take_scores_and_rules_by_name(images):
    """What `evaluate` and `score` open: prepare and score_prepared of a rule, whose images differ in size."""
    from imagereward_jax.bulk_scoring.scorers import open_scorer

    scorer = open_scorer("jpeg-incompressibility", batch_size=2)
    prepared = [scorer.prepare(images[0]), scorer.prepare(images[1][:8])]
    alone = [scorer.score("x", images[0]), scorer.score("x", images[1][:8])]
    np.testing.assert_allclose(scorer.score_prepared(["x", "y"], prepared), alone)


def test_a_users_function_scores(images, module):
    reward = open_reward("my_rewards:brightness")
    expected = [133.0, float(images[1].mean()) + 3]
    np.testing.assert_allclose(reward.score(["abc", "abc"], list(images)), expected, rtol=1e-6)
    assert reward.score("abc", Image.fromarray(images[0])) == 133.0
    assert not reward.differentiable


def test_bad_functions_are_refused_with_what_is_expected(images, module):
    with pytest.raises(ValueError, match=r"my_rewards:nothing.*expected module:function"):
        open_reward("my_rewards:nothing")
    with pytest.raises(ValueError, match=r"not_there:f"):
        open_reward("not_there:f")
    with pytest.raises(ValueError, match="constant is not a function"):
        open_reward("my_rewards:constant")
    with pytest.raises(ValueError, match="must return 2 finite numbers"):
        open_reward("my_rewards:too_few").score_arrays(images, ["a", "b"])


def test_what_is_a_rule():
    assert is_rule("jpeg-compressibility") and is_rule("package.module:function")
    assert not any(map(is_rule, ("ImageReward-v1.0", "tiny-shapes", "./a:b/c", "PickScore")))
    assert {"ImageReward-v1.0", "tiny-shapes", "HPSv2.1", "jpeg-compressibility"} <= set(available_rewards())
    with pytest.raises(ValueError, match="weights='x' applies only to CLIP"):
        open_reward("tiny-shapes", weights="x")
