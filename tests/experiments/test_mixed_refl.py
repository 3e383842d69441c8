"""Several rewards at once: their sum, and a ReFL run that logs and draws each."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections", "matplotlib"):
    pytest.importorskip(package)

from imagereward_jax.rewards.mixed import MixedReward, Term, apply_terms
from imagereward_jax.train import main
from imagereward_jax.training.metrics import read_rows

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


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_reward_folder):
    """Two ReFL steps with a mixture of two rewards."""
    folder = tmp_path_factory.mktemp("mixed")
    pipeline, params = tiny_sd1.make(folder / "tokenizer")
    pipeline.save(folder / "model", params)
    with tiny_sd1.quick_compilation(tmp_path_factory.mktemp("compiled")):
        status = main(
            [
                *("train", f"--config={CONFIG}", f"--workdir={folder / 'run'}"),
                *(
                    f"--config.model.path={folder / 'model'}",
                    *(f"--config.reward.terms.{name}.path={tiny_reward_folder}" for name in ("builtin", "trained")),
                ),
                *("--config.steps=2", "--config.batch_size=2", "--config.log_every=1", "--config.method.num_steps=2"),
                *("--config.method.stop_min=0", "--config.method.stop_max=1", "--config.method.pretrain=off"),
                *("--config.eval.num_prompts=2", "--config.eval.images_per_prompt=1", "--config.eval.num_steps=1"),
                *("--config.eval.batch_size=2", "--config.writers=('jsonl',)"),
            ]
        )
    assert status == 0
    return folder / "run"


def test_every_term_is_logged_at_every_step_and_in_the_evaluation(run):
    rows = read_rows(run / "metrics.jsonl")
    names = ("reward", "reward_builtin", "reward_trained")
    assert all({f"refl/{name}" for name in names} <= row.keys() for row in rows[1:])
    for row in (rows[0], rows[-1]):
        assert {"eval/reward_mean", "eval/reward_builtin", "eval/reward_trained"} <= row.keys()


def test_the_mixture_adds_up(run):
    """Weights 1 and 0.5, no clip."""
    for row in read_rows(run / "metrics.jsonl")[1:]:
        total = row["refl/reward_builtin"] + 0.5 * row["refl/reward_trained"]
        np.testing.assert_allclose(row["refl/reward"], total, atol=1e-4)


def test_the_report_draws_both_curves(run):
    page = (run / "report.html").read_text()
    for name in ("refl/reward_builtin", "refl/reward_trained", "eval/reward_builtin", "eval/reward_trained"):
        assert f"<!-- {name} -->" in page, name  # matplotlib writes each title beside its outlines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--config.reward.terms.trained.path=jpeg-compressibility"],
            "terms.trained.path.*no gradient.*policy-gradient",
        ),
        (
            ["--config.reward.terms.trained.path=my.module:reward"],
            "my.module:reward.*no gradient: it is for policy-gradient methods",
        ),
        (["--config.reward.path=tiny-shapes"], "reward.path='tiny-shapes' and config.reward.terms .*both given"),
        (["--config.reward.terms.builtin.std=0.0"], "terms.builtin.std=0.0: expected a number above 0"),
        (["--config.reward.terms.builtin.clip=-1.0"], "terms.builtin.clip=-1.0"),
        (["--config.reward.terms.builtin.path="], "terms.builtin.path is empty"),
    ],
)
def test_mixtures_that_cannot_work_are_refused(options, message, tmp_path, capsys):
    assert main(["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "run").exists()
