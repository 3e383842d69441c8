"""A workdir as a run leaves it, from made-up evaluations."""

import json

import numpy as np

from imagereward_jax.methods.base import Evaluation, ImageSamples
from imagereward_jax.recipes import default_config
from imagereward_jax.rewards.mixed import mean_of
from imagereward_jax.training.metric_writers import JsonlWriter
from imagereward_jax.training.samples import save_samples


def evaluation(prompts, rewards, size=8, seed=0):
    """What an evaluator gives of prompts with rewards [P, K]."""
    rewards = np.asarray(rewards, np.float64)
    images = np.random.default_rng(seed).random((rewards.size, size, size, 3), np.float32)
    repeated = [prompt for prompt in prompts for _ in range(rewards.shape[1])]
    samples = ImageSamples(images, repeated, [{}] * rewards.size, rewards.ravel(), held_out=True)
    return Evaluation({"eval/reward_mean": mean_of(rewards)}, None, samples, scores={"eval/reward_mean": rewards})


def record(workdir, evaluations, rows=(), **fields):
    """Writes a workdir.

    Args:
        evaluations: {step: an `Evaluation`}. rows: further (step, metrics), in order. fields: of the config.
    """
    config = default_config("refl")
    config.model.path = config.reward.path = "tiny-shapes"
    config.steps = 10
    config.update(fields)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    (workdir / "started.json").write_text(json.dumps({"command": "imagereward train", "trained": {}, "frozen": 0}))
    there = sorted([*rows, *((step, found.metrics) for step, found in evaluations.items())], key=lambda row: row[0])
    writer = JsonlWriter(workdir / "metrics.jsonl", last_step=None)
    for step, metrics in there:
        writer.write(step, metrics)
    writer.close()
    for step, found in evaluations.items():
        save_samples(workdir, step, 0, found)
    return workdir
