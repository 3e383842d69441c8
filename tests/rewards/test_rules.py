"""Rewards by rule: JPEG size both ways."""

import io

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.rewards.registry import available_rewards, open_reward


@pytest.fixture
def images():
    flat = np.full((16, 24, 3), 130, np.uint8)
    noisy = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    return np.stack([flat, noisy])


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


def test_rules_are_among_the_rewards():
    assert {"ImageReward-v1.0", "tiny-shapes", "HPSv2.1", "jpeg-compressibility"} <= set(available_rewards())
    with pytest.raises(ValueError, match="weights='x' applies only to CLIP"):
        open_reward("tiny-shapes", weights="x")
