"""The on-policy source: the run's own weights make the samples that it is then trained on.

A step samples in rounds, scores, turns scores into advantages and goes through the samples in shuffled minibatches.
While one round is sampled, functions score the images of the rounds before it.
"""

import concurrent.futures
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagereward_jax.methods.base import HOST, Batch, Key, Models, Params, Source
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.rewards.mixed import Terms, mean_of
from imagereward_jax.training.mesh import batch_sharding, from_all_processes, local_rows, put_batch


class Assign(Protocol):
    """Turns the rewards of a step into advantages; what it remembers is in every checkpoint."""

    def __call__(self, prompts: list[str], rewards: np.ndarray) -> np.ndarray:
        """Advantages float32 [N] of the N samples of all processes; a reward that is not finite is no verdict."""

    def get_state(self) -> Any:
        """A state for JSON, which later calls do not change."""

    def set_state(self, state: Any) -> None:
        """Resumes from `get_state`."""


class _Round(NamedTuple):
    """This process's share of a round: scores of networks, and of functions those to come."""

    prompts: list[str]
    rows: Batch
    scores: dict[str, np.ndarray]
    futures: dict[str, concurrent.futures.Future]


class Explore(Source):
    """Samples, rewards, advantages, minibatches: see the module.

    Args:
        prompts: batches of prompts, of the size of a round.
        terms: the reward.
        mesh: what samples are made on.
        shapes: of the components, for `spec`.
        batch_size: samples of an update, over all processes.
        compiler_options: of the program that samples.
        sample: (models, batch of prompts, key) -> (images [B, H, W, 3] in [0, 1], rows); pure; runs inside a compiled
            program. rows: nested dict of arrays [B, ...], what an update reads of the samples; "advantage" is added.
        assign: rewards to advantages.
        choose: (rows of a minibatch, rng) -> batch, NumPy: what of them is trained on.
        tables: what `sample` reads as `models.tables`.
        rounds: of sampling in a step. epochs: times that a step goes through its samples.
    """

    on_policy = True

    def __init__(
        self,
        prompts: Source,
        terms: Terms,
        *,
        mesh: Mesh,
        shapes: Params,
        batch_size: int,
        sample: Callable[[Models, Batch, Key], tuple[jax.Array, Batch]],
        assign: Assign,
        choose: Callable[[Batch, np.random.Generator], Batch],
        tables: Any = None,
        rounds: int = 1,
        epochs: int = 1,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.prompts, self.terms, self.mesh, self.shapes = prompts, terms, mesh, shapes
        self.sample, self.assign, self.choose, self.tables = sample, assign, choose, tables
        self.images, self.rounds, self.epochs = batch_size, rounds, epochs
        self.updates = max(1, epochs * rounds * prompts.images // batch_size)  # 0 where a plan tries larger batches
        self.metrics: dict[str, float] = {}
        self._run = jax.jit(self._round, out_shardings=batch_sharding(mesh), compiler_options=compiler_options)
        # A thread for each function: none is called twice at a time.
        self._threads = {name: concurrent.futures.ThreadPoolExecutor(1) for name in terms.functions}

    def spec(self) -> Batch:
        """See `methods.base.Source`."""
        key = jax.eval_shape(jax.random.key_data, jax.eval_shape(jax.random.key, 0))
        _, rows, _ = jax.eval_shape(self._sampled, Models(self.shapes), self.prompts.spec(), key)
        row = jax.tree.map(lambda array: np.zeros((1, *array.shape[1:]), array.dtype), rows)
        batch = self._minibatch({**row, "advantage": np.zeros(1, np.float32)}, np.random.default_rng(0), 0)
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct((self.images, *array.shape[1:]), array.dtype), batch)

    def batches(self, models: Models, key: Key) -> Iterator[Batch | None]:
        """The minibatches of one step, and None after each round and while functions score."""
        found = yield from self._explore(models, key)
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *(one.rows for one in found))
        rows["advantage"] = self._advantages(found)
        del models, found  # memory that the updates do not need
        count, size = len(rows["advantage"]), self.images // jax.process_count()
        rng = _generator(jax.random.fold_in(key, self.rounds))
        order = np.concatenate([rng.permutation(count) for _ in range(self.epochs)])
        for update, chosen in enumerate(order.reshape(self.updates, size)):
            yield self._minibatch(jax.tree.map(operator.itemgetter(chosen), rows), rng, update)

    def prepare(self, models: Models, batch: Batch) -> Batch:
        """See `methods.base.Source`: nothing is left to do."""
        return batch

    def get_state(self) -> dict[str, Any]:
        """See `methods.base.Source`."""
        return {**self.prompts.get_state(), "advantages": self.assign.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `methods.base.Source`."""
        self.prompts.set_state(state)
        self.assign.set_state(state["advantages"])

    def _minibatch(self, rows, rng, update):
        batch = self.choose(rows, rng)
        return {**batch, "update": np.full(len(rows["advantage"]), update, np.int32)}

    def _round(self, models, batch, key_data):
        with batch_over(self.mesh):
            return self._sampled(models, batch, key_data)

    def _sampled(self, models, batch, key_data):
        """Compiled: (images uint8 if functions score them, rows, {term: scores of networks})."""
        models = models._replace(tables=self.tables)
        batch = self.prompts.prepare(models, batch)
        images, rows = self.sample(models, batch, jax.random.wrap_key_data(key_data))
        scores = self.terms.apply_networks(models.policy.get("reward", {}), images, batch.get("reward"))
        pixels = jnp.round(images * 255).astype(jnp.uint8) if self.terms.functions else None
        return pixels, rows, scores

    def _explore(self, models, key):
        """Samples and scores; yields None in between."""
        prompts, waiting, found = self.prompts.batches(models, key), None, []
        try:
            for number in range(self.rounds):
                batch = next(prompts)
                round_key = np.asarray(jax.random.key_data(jax.random.fold_in(key, number)))
                made = self._run(models, put_batch(self.mesh, batch), round_key)
                if waiting is not None:
                    found.append(self._collect(*waiting))  # the round before, while the devices make this one
                waiting = batch[HOST], made
                yield None
            found.append(self._collect(*waiting))
            for one in found:
                for future in one.futures.values():
                    one.scores.update(future.result())
                yield None
        finally:  # a step that is given up leaves no images to score
            for future in (future for one in found for future in one.futures.values()):
                future.cancel()
        return found

    def _collect(self, texts, made):
        """A round on the host, its images on their way to the functions; texts: what its batch has under "host"."""
        pixels, rows, scores = made
        rows, scores = jax.tree.map(local_rows, (rows, scores))
        pixels = None if pixels is None else local_rows(pixels)
        futures = {
            name: thread.submit(self.terms.call_function, name, pixels, texts["prompt"], texts.get("metadata"))
            for name, thread in self._threads.items()
        }
        return _Round(texts["prompt"], rows, scores, futures)

    def _advantages(self, found):
        """The advantages of this process's samples, from the rewards of all processes; sets `metrics`."""
        own = {
            "prompts": [prompt for one in found for prompt in one.prompts],
            "scores": {
                name: scores.tolist() for name, scores in self.terms.join([one.scores for one in found]).items()
            },
        }
        everyone = from_all_processes(own)
        scores = self.terms.join([each["scores"] for each in everyone])
        rewards = self.terms.total(scores)
        advantages = self.assign([prompt for each in everyone for prompt in each["prompts"]], rewards)
        self.metrics = {"reward": mean_of(rewards), "reward_std": float(np.std(rewards[np.isfinite(rewards)]))}
        self.metrics |= self.terms.metrics(scores, rewards)
        count = len(own["prompts"])
        return advantages[jax.process_index() * count :][:count]


def _generator(key):
    """A NumPy generator for a key, another one in every process."""
    return np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), jax.process_index()])
