"""One training step: a pure, jitted, sharded function (state, frozen, batches) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from imagereward_jax.models.sharding import batch_over

OPTIMIZATION_LEVELS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}  # XLA's numbers: jax 0.10 takes no names


@struct.dataclass
class TrainState:
    """All that a run carries from step to step.

    step: updates asked for so far, int32. rng: key data of the run. params: float32 master weights of what trains.
    ema: their average, or an empty dict. skipped, skipped_in_row: updates that non-finite gradients cost.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array

    @property
    def averaged(self):
        """The weights to sample with and to export: the EMA where there is one."""
        return self.ema or self.params


class Phase(NamedTuple):
    """One loss and the update that follows it.

    loss: (trainable, frozen, batches, key) -> (scalar, metrics): a mean over the batch, pure, differentiable in the
        first.
    batches holds a batch of every data stream by name.
    """

    name: str
    loss: Callable


def compile_options(optimization_level):
    """What `Lowered.compile` takes for `config.optimization_level`."""
    return {"optimization_level": OPTIMIZATION_LEVELS[optimization_level]} if optimization_level else {}


def init_state(params, optimizer, *, seed, ema):
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def cast(tree, dtype):
    """Floating-point arrays of `tree` in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def make_train_step(phases, optimizer, *, dtype=jnp.float32, accumulation=1, ema_decay=0.0, mesh=None):
    """Builds the step. Each phase is a gradient and an update of its own, in order.

    Randomness is `fold_in(fold_in(key, step), phase)`: a run that continues from a checkpoint draws the same numbers.
    An update whose loss or gradient is not finite leaves weights, moments and EMA as they were and is counted.
    """

    def gradient(phase, params, frozen, batches, key):
        def loss(params, batches, key):
            with batch_over(mesh):
                return phase.loss(cast(params, dtype), frozen, batches, key)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if accumulation == 1:
            (value, metrics), grads = value_and_grad(params, batches, key)
            return grads, {"loss": value, **metrics}

        def split(rows):
            rows = rows.reshape(accumulation, -1, *rows.shape[1:])
            if mesh is not None:
                spec = jax.sharding.NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
                rows = jax.lax.with_sharding_constraint(rows, spec)
            return rows

        def body(total, round_):
            index, part = round_
            (value, metrics), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, grads), {"loss": value, **metrics}

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(body, zeros, (jnp.arange(accumulation), jax.tree.map(split, batches)))
        grads = jax.tree.map(lambda x: x / accumulation, total)
        return grads, {name: values.mean(0) for name, values in metrics.items()}

    def update(state, grads, loss):
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))  # the start weights fade out quickly
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params) if state.ema else {}

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = state.replace(
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return state, norm

    def train_step(state, frozen, batches):
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        logged = {}
        for index, phase in enumerate(phases):
            phase_key = jax.random.fold_in(key, index)
            grads, metrics = gradient(phase, state.params, frozen, batches, phase_key)
            state, norm = update(state, grads, metrics["loss"])
            logged |= {f"{phase.name}/{name}": value for name, value in metrics.items()}
            logged[f"{phase.name}/grad_norm"] = norm
        state = state.replace(step=state.step + 1)
        logged["skipped"] = state.skipped
        logged["skipped_in_row"] = state.skipped_in_row
        return state, logged

    return train_step
