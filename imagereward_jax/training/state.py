"""The state that a run carries from step to step, and its form in checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: training steps so far, int32. rng: key data of the run. params: float32 master weights of what trains.
        opt_state: the optimizer's moments. ema: the average of the weights, or an empty dict.
        skipped, skipped_in_row: updates skipped because loss, gradient or result was not finite.
        copies: averages that the method asked for, by name.
    """

    step: jax.Array
    rng: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    copies: Any

    @property
    def averaged(self) -> Any:
        """The weights to sample with and to export: the EMA if there is one."""
        return self.ema or self.params


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
    copies: Mapping[str, Callable] | tuple[str, ...] = (),
) -> TrainState:
    """The state before the first step; every average starts from the weights."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(jax.random.key(seed)),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        copies={name: jax.tree.map(jnp.copy, params) for name in copies},
    )


def to_checkpoint(state: TrainState) -> dict[str, Any]:
    """The state as checkpoints hold it: fields by name, without copies if there are none (as runs of before have)."""
    tree = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return tree if state.copies else {name: part for name, part in tree.items() if name != "copies"}


def from_checkpoint(tree: Mapping[str, Any]) -> TrainState:
    """The inverse of `to_checkpoint`."""
    return TrainState(**{"copies": {}, **tree})
