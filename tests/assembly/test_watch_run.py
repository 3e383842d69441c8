"""A reward with a flaw, tuned on the built-in model: it pays for brightness, so that white images please it most."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax import jax_reward
from imagereward_jax.assembly.given import Given
from imagereward_jax.assembly.judges import distance_within, embed_pixels, over_prompts
from imagereward_jax.assembly.run import assemble
from imagereward_jax.recipes import judge, recipe_beside, validate
from imagereward_jax.training.loop import train
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.weights.files import read_tensors

CONFIGS = Path(__file__).parents[2] / "configs"


@jax_reward
def brightness(images):
    """Ten times the mean of each image."""
    return 10 * images.mean((1, 2, 3))


def recipe(reward):
    config = recipe_beside(CONFIGS / "x", "hacking_tiny")
    config.steps, config.batch_size, config.writers, config.ema_decay = 8, 8, ("jsonl",), 0.0
    config.reward.path = reward
    config.method.update({"num_steps": 3, "stop_min": 1, "stop_max": 2, "threshold": 20.0, "pretrain": "off"})
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 0
    config.eval.update({"num_prompts": 8, "images_per_prompt": 2, "batch_size": 16, "num_steps": 8, "every": 2})
    config.eval.guidance_scales = ()
    config.eval.judges = {"builtin": judge("tiny-shapes")}
    config.stop.judge = "eval/checker_rate"
    validate(config)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, rows of the evaluations)"""
    workdir, config = tmp_path_factory.mktemp("hacking") / "run", recipe("brightness")
    train(config, functools.partial(assemble, given=Given(reward=brightness)), workdir)
    return workdir, [row for row in read_rows(workdir / "metrics.jsonl") if "eval/reward_mean" in row]


@pytest.mark.slow
def test_the_flaw_is_caught(run):
    """Reward up; checker, the judge that is not trained, and diversity down; it ends after three such evaluations."""
    workdir, rows = run
    first, last = rows[0], rows[-1]
    assert last["eval/reward_mean"] > first["eval/reward_mean"] + first["eval/reward_std"]
    for name in ("eval/checker_rate", "eval/judge_builtin", "eval/diversity"):
        assert last[name] < 0.8 * first[name], name
    assert last["step"] == 6
    done = json.loads((workdir / "done.json").read_text())
    assert done["step"] == last["step"] and done["stopped"].startswith("eval/checker_rate went from")


@pytest.mark.slow
def test_the_built_in_reward_is_not_taken_for_a_flaw(tmp_path, capsys):
    """The same run with the reward that the model is made for: no warning, and it goes on to its last step."""
    config = recipe("tiny-shapes")
    train(config, assemble, tmp_path / "run")
    assert json.loads((tmp_path / "run/done.json").read_text()) == {"step": 8, "exported": 8}
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_exported_is_the_best_by_the_judge(run):
    workdir, rows = run
    rates = {row["step"]: row["eval/checker_rate"] for row in rows}
    exported = json.loads((workdir / "done.json").read_text())["exported"]
    assert rates[exported] == max(rates.values())
    settings = json.loads((workdir / "config.json").read_text())
    base = CONFIGS.parent / "imagereward_jax/assets" / settings["model"]["path"]
    file = "unet/diffusion_pytorch_model.safetensors"
    there, tuned = read_tensors(base / file), read_tensors(workdir / "export" / file)
    same = all(np.array_equal(np.asarray(there[key], np.float32), tuned[key]) for key in there)
    assert same == (exported == 0)


@pytest.mark.slow
def test_drift_starts_at_nothing_and_grows(run):
    drift = [row["eval/drift"] for row in run[1]]
    assert drift[0] == 0 and drift[-1] > drift[1] > 0


@pytest.mark.slow
def test_the_report_shows_reward_judges_and_diversity_in_one_figure(run):
    page = (run[0] / "report.html").read_text()
    assert "Stopped at step" in page
    figure = page.partition("The reward, and what watches it")[2].partition("</figure>")[0]
    for name in ("reward_mean", "judge_builtin", "checker_rate", "diversity", "drift"):
        assert f">eval/{name}</code>" in figure, name


def test_distances_are_those_of_the_definition():
    """Mean over pairs of 1 - cosine, image by image."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 48, 40, 3), np.uint8)
    embeds = embed_pixels(images)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-6)
    expected = [
        np.mean([1 - embeds[i] @ embeds[j] for i in prompt for j in prompt if i < j])
        for prompt in ((0, 1, 2), (3, 4, 5))
    ]
    np.testing.assert_allclose(distance_within(embeds, 3), expected, rtol=1e-5)
    same = np.stack([images[0], images[0]])
    np.testing.assert_allclose(distance_within(embed_pixels(same), 2), [0], atol=1e-6)


def test_images_without_a_verdict_do_not_count():
    values = np.array([1.0, np.nan, 2.0, 4.0, np.nan, np.nan])
    np.testing.assert_array_equal(over_prompts(values, 2), [1.0, 3.0])
