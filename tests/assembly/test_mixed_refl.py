"""Several rewards at once: their sum, and the mixtures that are refused (tests/test_recipes.py trains with one)."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.rewards.mixed import MixedReward, Term, apply_terms
from imagereward_jax.train import main

CONFIG = Path(__file__).parents[2] / "configs" / "refl_tiny_mix.py"


class Brightness:
    """A reward without a network: `gain` times the mean of a picture, plus the prompt's length."""

    def __init__(self, gain):
        self.params, self.differentiable = {"gain": np.float32(gain)}, True

    def tokenize(self, prompts):
        return {"length": np.array([len(prompt) for prompt in prompts], np.float32)}

    def apply(self, params, images, tokens):
        return params["gain"] * images.mean((1, 2, 3)) + tokens["length"]

    def score(self, prompts, images):
        return np.asarray(self.apply(self.params, images, self.tokenize(prompts))).tolist()

    def inference_rank(self, prompt, images):
        return None, self.score([prompt] * len(images), images)


def test_a_mixture_is_the_weighted_sum_of_normalised_and_clipped_scores():
    """2 a - 0.5 clip((b - 5) / 4, -1, 1), where one b is clipped and the other is not."""
    mixture = MixedReward(
        {"a": Term(Brightness(10.0), weight=2.0), "b": Term(Brightness(1.0), weight=-0.5, mean=5, std=4, clip=1)}
    )
    images = np.stack([np.full((4, 4, 3), 0.25, np.float32), np.full((4, 4, 3), 0.5, np.float32)])
    prompts = ["1234", "1234567890"]
    a, b = [6.5, 15.0], [4.25, 10.5]
    expected = [2 * 6.5 - 0.5 * (4.25 - 5) / 4, 2 * 15.0 - 0.5 * 1]
    assert mixture.score(prompts, images) == pytest.approx(expected)
    total, terms = apply_terms(mixture, mixture.params, images, mixture.tokenize(prompts))
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose([terms["a"], terms["b"]], [a, b], rtol=1e-6)
    ranks, rewards = mixture.inference_rank("1234", images)
    assert ranks == [2, 1] and rewards[0] == pytest.approx(expected[0])

    def loss(images):
        return mixture.apply(mixture.params, images, mixture.tokenize(prompts)).sum()

    gradient = jax.grad(loss)(images).sum((1, 2, 3))  # of a clipped score there is none
    np.testing.assert_allclose(gradient, [2 * 10 - 0.5 / 4, 2 * 10], rtol=1e-5)


def test_a_term_needs_a_scale():
    with pytest.raises(ValueError, match="std=0"):
        Term(None, std=0)
    with pytest.raises(ValueError, match="clip=-1"):
        Term(None, clip=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--config.reward.terms.trained.path=jpeg-compressibility"],
            "terms.trained.path.*no gradient.*policy-gradient",
        ),
        (
            ["--config.reward.terms.trained.path=posixpath:join"],
            "posixpath:join.*no gradient: it is for policy-gradient methods.*'jax:posixpath:join'",
        ),
        (["--config.reward.terms.trained.path=jax:my.module:reward"], "jax:my.module:reward.*No module named 'my'"),
        (["--config.reward.path=tiny-shapes"], "reward.path='tiny-shapes' and config.reward.terms .*both given"),
        (["--config.reward.terms.builtin.std=0.0"], "terms.builtin.std=0.0: expected a number above 0"),
        (["--config.reward.terms.builtin.clip=-1.0"], "terms.builtin.clip=-1.0"),
        (["--config.reward.terms.builtin.path="], "terms.builtin.path is empty"),
    ],
)
def test_mixtures_that_cannot_work_are_refused(options, message, tmp_path, capsys):
    assert main(["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "run").exists()
