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

from imagereward_jax.methods.advantages import Scored
from imagereward_jax.methods.base import HOST, Batch, ImageSamples, Key, Models, Params, Source
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.rewards.mixed import Terms, mean_of
from imagereward_jax.training.mesh import batch_sharding, from_all_processes, local_rows, put_batch


class Assign(Protocol):
    """Turns the rewards of a step into advantages; what it remembers is in every checkpoint."""

    def __call__(self, scored: Scored) -> np.ndarray:
        """Advantages float32 [N] of the N samples of all processes; a reward that is not finite is no verdict."""

    def get_state(self) -> Any:
        """A state for JSON, which later calls do not change."""

    def set_state(self, state: Any) -> None:
        """Resumes from `get_state`."""


class _Round(NamedTuple):
    """This process's share of a round: what it was asked for ("prompt", "metadata"), images uint8 if they are kept, and
    scores of networks, and of functions those to come."""

    host: dict[str, list]
    pixels: np.ndarray | None
    rows: Batch
    scores: dict[str, np.ndarray]
    futures: dict[str, concurrent.futures.Future]


class Explore(Source):
    """Samples, rewards, advantages, minibatches: see the module.

    Args:
        prompts: batches of prompts, of the size of a round; `group` consecutive samples of a step share one.
        terms: the reward.
        mesh: what samples are made on.
        shapes: of the components, for `spec`.
        batch_size: samples of an update, over all processes.
        compiler_options: of the program that samples.
        sample: (models, batch of prompts, key) -> (images [B, H, W, 3] in [0, 1], rows); pure; runs inside a compiled
            program. The batch also has "group" and "training_step" int32 [B], the number of a sample's group in the
            step and of the step in the run. rows: nested dict of arrays [B, ...], what an update reads of the samples;
            "advantage" is added.
        assign: rewards to advantages.
        choose: (rows of a minibatch, rng) -> batch, NumPy: what of them is trained on.
        tables: what `sample` reads as `models.tables`. copies: names of `models.copies` that it reads.
        group: consecutive samples that are compared with each other; all are of one process.
        select: (rows of whole groups, with their advantages) -> the rows that train, and `selected`, how many it makes
            of a group; None for all.
        rounds: of sampling in a step. epochs: times that a step goes through its samples.
        keep_samples: whether `samples` has the images of the present step.
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
        copies: tuple[str, ...] = (),
        group: int = 1,
        select: Callable[[Batch], Batch] | None = None,
        selected: int | None = None,
        rounds: int = 1,
        epochs: int = 1,
        keep_samples: bool = False,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.prompts, self.terms, self.mesh, self.shapes = prompts, terms, mesh, shapes
        self.sample, self.assign, self.choose, self.tables = sample, assign, choose, tables
        self.images, self.rounds, self.epochs, self.keep_samples = batch_size, rounds, epochs, keep_samples
        self.group, self.select, self.copies, self.steps = group, select or (lambda rows: rows), copies, 0
        trained = epochs * rounds * prompts.images * (selected or group) // group
        self.updates = max(1, trained // batch_size)  # 0 where a plan tries larger batches
        self.metrics: dict[str, float] = {}
        self._run = jax.jit(self._round, out_shardings=batch_sharding(mesh), compiler_options=compiler_options)
        # A thread for each function: none is called twice at a time.
        self._threads = {name: concurrent.futures.ThreadPoolExecutor(1) for name in terms.functions}

    def spec(self) -> Batch:
        """See `methods.base.Source`."""
        key = jax.eval_shape(jax.random.key_data, jax.eval_shape(jax.random.key, 0))
        numbers = jax.ShapeDtypeStruct((self.prompts.images,), np.int32)
        batch = {**self.prompts.spec(), "group": numbers, "training_step": numbers}
        models = Models(self.shapes, copies=dict.fromkeys(self.copies, self.shapes))
        _, rows, _ = jax.eval_shape(self._sampled, models, batch, key)
        rows = jax.tree.map(lambda array: np.zeros((self.group, *array.shape[1:]), array.dtype), rows)
        rows = self.select({**rows, "advantage": np.zeros(self.group, np.float32)})
        batch = self._minibatch(rows, np.random.default_rng(0), 0)
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct((self.images, *array.shape[1:]), array.dtype), batch)

    def batches(self, models: Models, key: Key) -> Iterator[Batch | None]:
        """The minibatches of one step, and None after each round and while functions score."""
        found = yield from self._explore(models, key)
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *(one.rows for one in found))
        rows = self.select({**rows, "advantage": self._advantages(found)})
        self.steps += 1
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
        return {**self.prompts.get_state(), "advantages": self.assign.get_state(), "explored": self.steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `methods.base.Source`."""
        self.prompts.set_state(state)
        self.assign.set_state(state["advantages"])
        self.steps = state.get("explored", 0)  # runs of before have none, and nothing that reads it

    def _minibatch(self, rows, rng, update):
        batch = self.choose(rows, rng)
        return {**batch, "update": np.full(len(rows["advantage"]), update, np.int32)}

    def _round(self, models, batch, key_data):
        with batch_over(self.mesh):
            return self._sampled(models, batch, key_data)

    def _sampled(self, models, batch, key_data):
        """Compiled: (images uint8 if the host needs them, rows, {term: scores of networks})."""
        models = models._replace(tables=self.tables)
        batch = self.prompts.prepare(models, batch)
        images, rows = self.sample(models, batch, jax.random.wrap_key_data(key_data))
        scores = self.terms.apply_networks(models.policy.get("reward", {}), images, batch.get("reward"))
        needed = self.keep_samples or self.terms.functions
        pixels = jnp.round(images * 255).astype(jnp.uint8) if needed else None
        return pixels, rows, scores

    def _explore(self, models, key):
        """Samples and scores; yields None in between."""
        prompts, waiting, found = self.prompts.batches(models, key), None, []
        try:
            for number in range(self.rounds):
                batch = next(prompts)
                round_key = np.asarray(jax.random.key_data(jax.random.fold_in(key, number)))
                made = self._run(models, put_batch(self.mesh, self._numbered(batch, number)), round_key)
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

    def _numbered(self, batch, number):
        """The batch of a round with the numbers of its groups and of the step."""
        count = len(batch[HOST]["prompt"])
        first = (jax.process_index() * self.rounds + number) * count
        groups = (first + np.arange(count, dtype=np.int32)) // self.group
        return {**batch, "group": groups, "training_step": np.full(count, self.steps, np.int32)}

    def _collect(self, host, made):
        """A round on the host, its images on their way to the functions; host: what its batch has under "host"."""
        pixels, rows, scores = made
        rows, scores = jax.tree.map(local_rows, (rows, scores))
        pixels = None if pixels is None else local_rows(pixels)
        futures = {
            name: thread.submit(self.terms.call_function, name, pixels, host["prompt"], host.get("metadata"))
            for name, thread in self._threads.items()
        }
        return _Round(host, pixels if self.keep_samples else None, rows, scores, futures)

    def _advantages(self, found):
        """The advantages of this process's samples, from the rewards of all processes; sets `metrics` and `samples`."""
        own = {
            "prompts": [prompt for one in found for prompt in one.host["prompt"]],
            "scores": {
                name: scores.tolist() for name, scores in self.terms.join([one.scores for one in found]).items()
            },
        }
        everyone = from_all_processes(own)
        scores = self.terms.join([each["scores"] for each in everyone])
        rewards = self.terms.total(scores)
        prompts = [prompt for each in everyone for prompt in each["prompts"]]
        groups, terms = np.arange(len(prompts)) // self.group, self.terms.contributions(scores)
        advantages = self.assign(Scored(prompts, rewards, groups, terms))
        self.metrics = {"reward": mean_of(rewards), "reward_std": float(np.std(rewards[np.isfinite(rewards)]))}
        self.metrics |= self.terms.metrics(scores, rewards)
        count = len(own["prompts"])
        mine = slice(jax.process_index() * count, (jax.process_index() + 1) * count)
        if self.keep_samples:
            images = np.concatenate([one.pixels for one in found]).astype(np.float32) / 255
            metadata = [row for one in found for row in one.host["metadata"]]
            self.samples = ImageSamples(images, own["prompts"], metadata, rewards[mine], held_out=False)
        return advantages[mine]


def _generator(key):
    """A NumPy generator for a key, another one in every process."""
    return np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), jax.process_index()])
