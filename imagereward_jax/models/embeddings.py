"""Embeddings of timesteps and positions in sines and cosines."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.layers import Linear, RngsLike


def sinusoidal_embedding(
    positions: jax.Array, features: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> jax.Array:
    """Sines and cosines of `positions` [B] at features / 2 frequencies from 1 to 1e-4: float32 [B, features]."""
    half = features // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them: [..., in_features] -> [..., features]."""

    def __init__(self, in_features: int, features: int, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.linear_1 = Linear(in_features, features, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def position_table(side: int, features: int, *, base: int) -> jax.Array:
    """Sines and cosines of the columns, then of the rows, of a square of patches.

    Args:
        side: patches along each side of the square; they are numbered from 0 to `base` (exclusive), evenly spaced.
        features: a multiple of 4; half of them are the column's.

    Returns:
        float32 [side * side, features], row by row.
    """
    along = sinusoidal_embedding(jnp.arange(side) * (base / side), features // 2, flip_sin_to_cos=False)
    columns, rows = jnp.tile(along, (side, 1)), jnp.repeat(along, side, axis=0)
    return jnp.concatenate([columns, rows], axis=-1)
