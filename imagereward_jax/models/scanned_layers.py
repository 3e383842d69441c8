"""Stacks of equal layers: one layer whose parameters are stacked along a new first axis.

A scan runs the layers one after the other, so a network of 70 transformer blocks compiles as eleven. PyTorch
checkpoints number the layers ("transformer_blocks.3"); `weights.mapping` converts between the two.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models.dropout import layer_noise

Carry = TypeVar("Carry")


def stack(layers: Sequence[nnx.Module]) -> nnx.Module:
    """Stacks layers of one class into one layer with the parameters of all; `run_layers` calls it."""
    layout = nnx.graphdef(layers[0])
    merged = nnx.merge(layout, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, layers)))
    merged.stacked = len(layers)
    return merged


def is_scanned(layer: nnx.Module) -> bool:
    """Whether `scan` runs this layer in a loop; a `stack` of one layer is called directly."""
    return getattr(layer, "stacked", 1) > 1


def run_layers(stacked: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """Applies each layer of a `stack` in turn, as `layer(x, *args)`; the result has the shape and dtype of `x`."""
    return scan(stacked, lambda layer, x: layer(x, *args), x)


def scan(stacked: nnx.Module, function: Callable[[nnx.Module, Carry], Carry], carry: Carry) -> Carry:
    """Computes `carry = function(layer, carry)` for each layer of a `stack`; `carry` keeps its shapes and dtypes."""
    layout, state = nnx.split(stacked)
    if not is_scanned(stacked):
        return function(nnx.merge(layout, jax.tree.map(lambda leaf: leaf[0], state)), carry)

    def body(carry, index_and_state):
        index, state = index_and_state
        with layer_noise(index):
            return function(nnx.merge(layout, state), carry), None

    return jax.lax.scan(body, carry, (jnp.arange(stacked.stacked), state))[0]


def depths(network: nnx.Module) -> dict[tuple[str | int, ...], int]:
    """Returns {path: number of layers} of every stack of a network, abstract or not."""
    return {
        tuple(path): module.stacked
        for path, module in nnx.iter_modules(network)
        if getattr(module, "stacked", None) is not None
    }


def numbered(
    path: Sequence[str | int], stacks: dict[tuple[str | int, ...], int]
) -> list[tuple[tuple[str | int, ...], int | None]]:
    """Expands a path of a network to PyTorch's numbered paths.

    Args:
        path: of a layer or parameter.
        stacks: the network's `depths`.

    Returns:
        [(path with the layer's index, that index)] for each layer of a stack; outside of stacks [(path, None)].
    """
    for length in range(1, len(path) + 1):
        if depth := stacks.get(tuple(path[:length])):
            return [((*path[:length], index, *path[length:]), index) for index in range(depth)]
    return [(tuple(path), None)]
