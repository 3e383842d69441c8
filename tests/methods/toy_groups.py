"""On-policy methods on a toy flow: parts that `make` takes, and steps of the real source and the real training step.

As a script, `toy_groups.py METHOD [flags of distributed.join]`, it makes a step on all devices and prints it as JSON.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

for _folder in ("", "training"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))

from toy import toy_config
from toy_flow import ToyFlow

from imagereward_jax.assembly.conditions import GroupedSource
from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.prompts import PromptRows
from imagereward_jax.distributed import join
from imagereward_jax.methods.base import HOST
from imagereward_jax.rewards.mixed import Term, Terms
from imagereward_jax.training.explore import Explore
from imagereward_jax.training.mesh import from_all_processes, make_mesh, put_batch
from imagereward_jax.training.program import AssembledRun, TrainingProgram
from imagereward_jax.training.step import join_models

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
WEIGHT = 0.7


def brightness(images, prompts):
    """The mean of an image, less a tenth for each letter of its prompt."""
    return images.mean((1, 2, 3)) / 255 - 0.1 * np.array([len(prompt) for prompt in prompts])


class ToyParts:
    """What `make(config, parts)` of an on-policy method uses; prompts are told to the network by their length."""

    abstract = False

    def __init__(self, mesh, batch_size, terms=None):
        self.mesh, self.batch_size, self.pipeline = mesh, batch_size, ToyFlow()
        self.terms = terms or Terms({"": Term(brightness)})

    def samples(self, height, width):
        return {}

    def explore(self, *, negative_prompt=None, round_size=None, rounds=1, group=1, **options):
        size = round_size or self.batch_size

        def transform(batch):
            x = np.array([0.2 * len(prompt) for prompt in batch["prompt"]], np.float32)
            return {"cond": {"x": x}, HOST: {"prompt": batch["prompt"], "metadata": batch["metadata"]}}

        rows = make_iterator(
            PromptRows(PROMPTS),
            batch_size=rounds * size // group // jax.process_count(),
            seed=0,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        spec = {"cond": {"x": jax.ShapeDtypeStruct((size,), jnp.float32)}}
        prompts = GroupedSource("prompts", rows, transform, spec, images=size, group=group, parts=rounds)
        shapes = {"toy": jax.ShapeDtypeStruct((), jnp.float32)}
        options |= {"mesh": self.mesh, "shapes": shapes, "batch_size": self.batch_size, "keep_samples": True}
        return Explore(prompts, self.terms, rounds=rounds, group=group, **options)


def run(name, config, mesh, batch_size, *, steps=1, rate=0.01, terms=None):
    """Steps of a method: (the source, all batches of each step, metrics of each update, the state)."""
    changes = {"batch_size": batch_size, "optimizer.learning_rate": rate, "ema_decay": 0.0}
    whole = toy_config(**changes, **{"optimizer.schedule": "constant", "optimizer.warmup_steps": 0})
    parts = ToyParts(mesh, batch_size, terms)
    method = importlib.import_module(f"imagereward_jax.methods.{name}").make(config, parts)
    weights = {"toy": jnp.float32(WEIGHT)}
    assembled = AssembledRun(method, weights, {}, reference_of=lambda cast: {"toy": jnp.float32(WEIGHT)})
    program, (phase,) = TrainingProgram(whole, assembled, mesh), method.phases
    state, fixed, step = program.initial_state(weights), program.fixed(assembled), program.jitted()
    batches, metrics = [], []
    for number in range(steps):
        models = join_models(fixed, state.params, state.copies, lambda tree: tree)
        made = phase.source.batches(models, jax.random.fold_in(jax.random.key(1), number))
        batches.append([batch for batch in made if batch is not None])
        for update, batch in enumerate(batches[-1]):
            state, found = step(state, fixed, {phase.name: put_batch(mesh, batch)}, np.int32(update))
            metrics.append({key.partition("/")[2]: jax.device_get(value) for key, value in found.items()})
    return types.SimpleNamespace(source=phase.source, batches=batches, metrics=metrics, state=state, method=method)


SETTINGS = {
    "flow_grpo": {"num_steps": 4, "group_size": 4, "round_size": 8, "rounds": 2},
    "awm": {"num_steps": 4, "group_size": 4, "round_size": 8, "rounds": 2, "noise_levels": 3},
    "nft": {"num_steps": 4, "group_size": 4, "round_size": 8, "rounds": 2, "noise_levels": 3},
}


def settings(name, **changes):
    """The config of a method, scaled down."""
    module = importlib.import_module(f"imagereward_jax.methods.{name}")
    return module.Config(**{"guidance_scale": 1.0, "height": 8, "width": 8, **SETTINGS.get(name, {}), **changes})


def main(name, *flags):
    if flags:
        given = dict(flag.lstrip("-").split("=") for flag in flags)
        join(given["coordinator"], int(given["num-processes"]), int(given["process-id"]))
    done = run(name, settings(name), make_mesh(-1, 1), 16)
    samples, (batch,), (metrics,) = done.source.samples, done.batches[0], done.metrics
    own = {"prompts": samples.prompts, "rewards": samples.rewards.tolist()}
    own |= {"x": batch["cond"]["x"].tolist(), "advantage": batch["advantage"].tolist()}
    said = {
        "everyone": from_all_processes(own),
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
    }
    if "ratio_error" in metrics:
        said["ratio_error"] = float(metrics["ratio_error"].value)
    if jax.process_index() == 0:
        print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
