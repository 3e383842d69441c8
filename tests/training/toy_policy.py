"""An on-policy run of the real loop on a toy, a Gaussian of two numbers.

As a script, `toy_policy.py WORKDIR PLACE CALL`, it kills itself at that call of a place: see `assemble_policy`.
"""

import os
import signal
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from toy import toy_config, train

from imagereward_jax.assembly.conditions import DataSource
from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.prompts import PromptRows
from imagereward_jax.methods.advantages import PromptAdvantages
from imagereward_jax.methods.base import HOST, Export, Method, Phase
from imagereward_jax.rewards.mixed import Term, Terms
from imagereward_jax.rewards.rules import RuleReward
from imagereward_jax.training.explore import Explore
from imagereward_jax.training.mesh import weight_shardings
from imagereward_jax.training.program import AssembledRun

PROMPTS = ["a", "bb", "ccc"]
SPREAD = 0.5


class Brightness(RuleReward):
    """The mean of an image, less a tenth for each letter of its prompt."""

    def score_arrays(self, images, prompts, metadata=None):
        return images.mean((1, 2, 3)) / 255 - 0.1 * np.array([len(prompt) for prompt in prompts])


def one_term(function):
    """A reward of one function."""
    return Terms({"": Term(function)}, {"": "the reward"})


def prompt_source(size, seed=0):
    """Batches of "length" [size]."""

    def transform(batch):
        length = np.array([len(prompt) for prompt in batch["prompt"]], np.float32)
        return {"length": length, HOST: {"prompt": batch["prompt"]}}

    shares = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    rows = make_iterator(PromptRows(PROMPTS), batch_size=size // jax.process_count(), seed=seed, **shares)
    return DataSource("prompts", rows, transform, {"length": jax.ShapeDtypeStruct((size,), jnp.float32)}, images=size)


def sample(models, batch, key):
    """Draws around the weights, as images of one colour."""
    x = models.policy["net"]["w"] + SPREAD * jax.random.normal(key, (*batch["length"].shape, 2))
    images = jnp.broadcast_to(jax.nn.sigmoid(x.sum(-1))[:, None, None, None], (len(x), 2, 2, 3))
    return images, {"x": x, "length": batch["length"]}


def make_explore(mesh, terms, *, choose=lambda rows, rng: rows, rounds=2, round_size=4, batch_size=4, epochs=2):
    """The source of a reward's terms."""
    shapes = {"net": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    return Explore(
        prompt_source(round_size),
        terms,
        mesh=mesh,
        shapes=shapes,
        batch_size=batch_size,
        sample=sample,
        assign=PromptAdvantages(buffer=6, min_count=3, clip=2.0),
        choose=choose,
        rounds=rounds,
        epochs=epochs,
    )


def policy_loss(models, batch, key):
    """The policy gradient's: advantages times log-probabilities."""
    log_probs = -0.5 * jnp.square((batch["x"] - models.policy["net"]["w"]) / SPREAD).sum(-1)
    return -(batch["advantage"] * log_probs).mean(), {"first": (batch["update"] == 0).mean()}


def assemble_policy(config, mesh, place=None, call=0, number=signal.SIGTERM):
    """The run; at this call, counted from 1, of a place it signals itself.

    place: "prompts" (in sampling), "reward" (in the function's thread), "choose" (between two updates).
    """
    calls = Counter()

    def called(name):
        calls[name] += 1
        if name == place and calls[name] == call:
            os.kill(os.getpid(), number)

    class Watched(Brightness):
        def score_arrays(self, images, prompts, metadata=None):
            called("reward")
            return super().score_arrays(images, prompts)

    def choose(rows, rng):
        called("choose")
        return rows

    def watched_sample(inner):
        for batch in inner:
            called("prompts")
            yield batch

    source = make_explore(mesh, one_term(Watched()), choose=choose)
    asked = source.prompts.batches
    source.prompts.batches = lambda models, key: watched_sample(asked(models, key))
    method = Method((Phase("policy", policy_loss, source),), trains=("net",), shown="policy/reward")
    weights = {"net": {"w": np.zeros(2, np.float32)}}

    def export(components, _, folder):
        np.save(folder / "w.npy", np.asarray(components["net"]["w"]))

    weights = jax.device_put(weights, weight_shardings(mesh, weights))
    return AssembledRun(method, weights, {}, Export(export, "w.npy", ("net",)))


def policy_config():
    """Five steps of two rounds and four updates, a checkpoint after every second."""
    changes = {"steps": 5, "batch_size": 4, "log_every": 1, "eval.every": 5, "checkpoint.every": 2, "ema_decay": 0.0}
    return toy_config(**changes, **{"optimizer.warmup_steps": 0, "optimizer.learning_rate": 0.1})


if __name__ == "__main__":
    workdir, where, at = sys.argv[1:]
    train(policy_config(), lambda *both: assemble_policy(*both, where, int(at), signal.SIGKILL), workdir)
