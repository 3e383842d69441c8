"""One training step: a pure, jitted, sharded function (state, fixed, batches) -> (state, metrics)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.methods.base import Mean, Models, Phase
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.sections.run import OPTIMIZATION_LEVELS
from imagereward_jax.training.state import TrainState


class Fixed(NamedTuple):
    """Inputs of a step that it does not change.

    Attributes:
        frozen: the components and parts of components that do not train, in the compute dtype.
        reference: what training started from, of what trains; None if no loss reads it.
        tables: the phases' `Phase.tables`, by name.
    """

    frozen: Any
    reference: Any = None
    tables: Mapping[str, Any] = {}


def compile_options(optimization_level: str | None) -> dict[str, Any]:
    """Options of `Lowered.compile` for `config.optimization_level`."""
    return {"optimization_level": OPTIMIZATION_LEVELS[optimization_level]} if optimization_level else {}


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays of `tree` in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def make_train_step(
    phases: tuple[Phase, ...],
    optimizer: optax.GradientTransformation,
    *,
    dtype: Any = jnp.float32,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    copies: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Fixed, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step: each phase's gradients and updates, in order.

    Randomness is `fold_in(fold_in(key, step), phase)`, and with several updates per phase also by the update: a run
    that resumes draws the same numbers. An update whose loss or gradient is not finite leaves weights, moments and
    averages as they were and is counted.

    Args:
        phases: batches are given by their names.
        copies: averages of the weights to keep, {name: update -> decay}.
    """
    return _Step(phases, optimizer, dtype, accumulation, ema_decay, dict(copies or {}), mesh)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """See `make_train_step`; `index` is the number of an update in the run."""

    phases: tuple[Phase, ...]
    optimizer: optax.GradientTransformation
    dtype: Any
    accumulation: int
    ema_decay: float
    copies: dict[str, Callable]
    mesh: Mesh | None

    def __call__(self, state, fixed, batches):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        logged, index = {}, state.step * sum(phase.source.updates for phase in self.phases)
        for number, phase in enumerate(self.phases):
            phase_key = jax.random.fold_in(key, number)
            state, metrics = self.run_phase(phase, state, fixed, batches[phase.name], phase_key, index)
            logged |= {f"{phase.name}/{name}": value for name, value in metrics.items()}
            index += phase.source.updates
        state = state.replace(step=state.step + 1)
        return state, {**logged, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}

    def run_phase(self, phase, state, fixed, batches, key, index):
        """All updates of one phase, the first of which is `index`."""
        if phase.source.updates == 1:
            return self.run_update(phase, state, fixed, batches, key, index)

        def body(state, number_and_batch):
            number, batch = number_and_batch
            return self.run_update(phase, state, fixed, batch, jax.random.fold_in(key, number), index + number)

        state, metrics = jax.lax.scan(body, state, (jnp.arange(phase.source.updates), batches))
        return state, {name: values.mean(0) for name, values in metrics.items()}

    def run_update(self, phase, state, fixed, batch, key, index):
        loss, grads, metrics = self.gradient(phase, state, fixed, batch, key)
        state, norm = self.update(state, grads, loss, index)
        return state, {"loss": loss, **metrics, "grad_norm": norm}

    def gradient(self, phase, state, fixed, batch, key):
        """(mean loss, gradients, metrics) of one batch, in rounds if there are several."""
        value_and_grad = jax.value_and_grad(functools.partial(self.loss, phase, state, fixed), has_aux=True)
        if self.accumulation == 1:
            (value, (_, metrics)), grads = value_and_grad(state.params, batch, key)
            return value, grads, {name: _value(metric) for name, metric in metrics.items()}

        def body(total, round_):
            index, part = round_
            (_, (mean, metrics)), grads = value_and_grad(state.params, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, grads), (mean, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        rounds = (jnp.arange(self.accumulation), jax.tree.map(self.split, batch))
        total, (losses, metrics) = jax.lax.scan(body, zeros, rounds)
        count = jnp.maximum(losses.count.sum(), 1)
        grads = jax.tree.map(lambda x: x / count, total)
        return losses.total.sum() / count, grads, {name: _over_rounds(metric) for name, metric in metrics.items()}

    def loss(self, phase, state, fixed, params, batch, key):
        """(the number that is differentiated, (the loss as a `Mean`, metrics)).

        That number is the mean itself; in rounds it is the sum, which is divided when all are added.
        """
        models = Models(
            policy=join(fixed.frozen, cast(params, self.dtype)),
            reference=None if fixed.reference is None else join(fixed.frozen, fixed.reference),
            copies={name: join(fixed.frozen, cast(tree, self.dtype)) for name, tree in state.copies.items()},
            tables=fixed.tables.get(phase.name),
        )
        with batch_over(self.mesh):
            value, metrics = phase.loss(models, phase.source.prepare(models, batch), key)
        mean = value if isinstance(value, Mean) else Mean(value, jnp.ones((), jnp.float32))
        return mean.total if self.accumulation > 1 else _value(value), (mean, metrics)

    def split(self, rows):
        """Rows [B, ...] as [rounds, B / rounds, ...], each round sharded over the mesh."""
        rows = rows.reshape(self.accumulation, -1, *rows.shape[1:])
        if self.mesh is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp"))))

    def update(self, state, grads, loss, index):
        """(the state after one update, the gradient's norm)."""
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def average(old, decay):
            return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, old, params)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        decay = jnp.minimum(self.ema_decay, (1 + index) / (10 + index))  # the start weights fade out quickly
        averages = {name: average(tree, self.copies[name](index)) for name, tree in state.copies.items()}
        state = state.replace(
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(average(state.ema, decay), state.ema) if state.ema else {},
            copies=keep(averages, state.copies),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return state, norm


def _value(metric):
    return metric.value if isinstance(metric, Mean) else metric


def _over_rounds(metric):
    """The metric of a whole batch from those of its rounds [rounds]."""
    if isinstance(metric, Mean):
        return Mean(metric.total.sum(), metric.count.sum()).value
    return metric.mean(0)
