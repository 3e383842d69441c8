"""One training step: a pure, jitted, sharded function (state, fixed, batches) -> (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.methods.base import Mean, Models, Phase
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.training.settings import OPTIMIZATION_LEVELS
from imagereward_jax.training.state import TrainState


class Fixed(NamedTuple):
    """What a step reads and does not change.

    Attributes:
        frozen: the components and parts of components that do not train, in the compute dtype.
        reference: what training started from, of what trains; None if no loss reads it.
        tables: the phases' `Phase.tables`, by name.
    """

    frozen: Any
    reference: Any = None
    tables: Mapping[str, Any] = {}


def compile_options(optimization_level: str | None) -> dict[str, Any]:
    """What `Lowered.compile` takes for `config.optimization_level`."""
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
    copies = dict(copies or {})
    per_step = sum(phase.source.updates for phase in phases)

    def models_of(params, state, fixed, phase):
        return Models(
            policy=join(fixed.frozen, cast(params, dtype)),
            reference=None if fixed.reference is None else join(fixed.frozen, fixed.reference),
            copies={name: join(fixed.frozen, cast(tree, dtype)) for name, tree in state.copies.items()},
            tables=fixed.tables.get(phase.name),
        )

    def gradient(phase, state, fixed, batch, key):
        """(mean loss, gradients, metrics) of one update."""

        def loss(params, batch, key):
            with batch_over(mesh):
                models = models_of(params, state, fixed, phase)
                value, metrics = phase.loss(models, phase.source.prepare(models, batch), key)
            whole = value if isinstance(value, Mean) else Mean(value, jnp.ones((), jnp.float32))
            # at once the mean itself, so that nothing is divided behind the gradient; in rounds the sum
            differentiated = whole.total if accumulation > 1 else (value.value if isinstance(value, Mean) else value)
            return differentiated, (whole, metrics)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if accumulation == 1:
            (value, (_, metrics)), grads = value_and_grad(state.params, batch, key)
            return value, grads, {name: _value(metric) for name, metric in metrics.items()}

        def body(total, round_):
            index, part = round_
            (_, (whole, metrics)), grads = value_and_grad(state.params, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, grads), (whole, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        rounds = (jnp.arange(accumulation), jax.tree.map(_split, batch))
        total, (losses, metrics) = jax.lax.scan(body, zeros, rounds)
        count = jnp.maximum(losses.count.sum(), 1)
        grads = jax.tree.map(lambda x: x / count, total)
        return losses.total.sum() / count, grads, {name: _over_rounds(metric) for name, metric in metrics.items()}

    def _split(rows):
        rows = rows.reshape(accumulation, -1, *rows.shape[1:])
        if mesh is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))

    def update(state, grads, loss, index):
        """The state after one update, the number of which is `index`, and the gradient's norm."""
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def average(old, decay):
            return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, old, params)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        decay = jnp.minimum(ema_decay, (1 + index) / (10 + index))  # the start weights fade out quickly
        state = state.replace(
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(average(state.ema, decay), state.ema) if state.ema else {},
            copies={name: keep(average(tree, copies[name](index)), tree) for name, tree in state.copies.items()},
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return state, norm

    def run_phase(phase, state, fixed, batches, key, first):
        """All updates of one phase; `first` is the number of the first of them in the run."""

        def once(state, batch, key, index):
            loss, grads, metrics = gradient(phase, state, fixed, batch, key)
            state, norm = update(state, grads, loss, index)
            return state, {"loss": loss, **metrics, "grad_norm": norm}

        if phase.source.updates == 1:
            return once(state, batches, key, first)

        def body(state, number_and_batch):
            number, batch = number_and_batch
            return once(state, batch, jax.random.fold_in(key, number), first + number)

        state, metrics = jax.lax.scan(body, state, (jnp.arange(phase.source.updates), batches))
        return state, {name: values.mean(0) for name, values in metrics.items()}

    def train_step(state, fixed, batches):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        logged, number = {}, state.step * per_step
        for index, phase in enumerate(phases):
            phase_key = jax.random.fold_in(key, index)
            state, metrics = run_phase(phase, state, fixed, batches[phase.name], phase_key, number)
            logged |= {f"{phase.name}/{name}": value for name, value in metrics.items()}
            number += phase.source.updates
        state = state.replace(step=state.step + 1)
        logged["skipped"] = state.skipped
        logged["skipped_in_row"] = state.skipped_in_row
        return state, logged

    return train_step


def _value(metric):
    return metric.value if isinstance(metric, Mean) else metric


def _over_rounds(metric):
    """The metric of a whole batch from those of its rounds [rounds]."""
    if isinstance(metric, Mean):
        return Mean(metric.total.sum(), metric.count.sum()).value
    return metric.mean(0)
