"""Checksums of arrays, wherever their parts lie: a checkpoint in which a bit changed is not taken for a whole one."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_MULTIPLIER = 2654435761  # odd and far from any regular spacing (Knuth's)


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of each array of `tree` by its path; the same on every mesh.

    Each number's bits are multiplied by an odd number that depends on its place, and summed modulo 2^32. So any change
    of one number changes the sum, and an exchange of two almost always.
    """
    sums = jax.device_get(jax.tree.map(_sum, tree))
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


def text_checksum(values: Mapping[str, Any]) -> int:
    """A checksum of values for JSON."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


@jax.jit  # of one array: equal shapes, of weights, moments and averages, compile once
def _sum(array):
    array = jnp.asarray(array)
    bits = array
    if not jnp.issubdtype(array.dtype, jnp.bool_):
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    bits, place, stride = bits.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(array.ndim)):  # no reshape: it would gather a sharded array
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (place * jnp.uint32(_MULTIPLIER) * 2 + 1), dtype=jnp.uint32)
