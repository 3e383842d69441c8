"""Repeated layers of one shape as one layer whose parameters are stacked along a new first axis.

A scan runs them one after the other, so that a network of 70 transformer blocks is compiled as eleven. The PyTorch
checkpoints number the layers ("transformer_blocks.3"); `weights.mapping` takes the stack apart and puts it together.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models.dropout import layer_noise

Carry = TypeVar("Carry")


def stack(layers: Sequence[nnx.Module]) -> nnx.Module:
    """One layer, of the class of `layers`, that holds the parameters of them all; `run_layers` calls it."""
    layout = nnx.graphdef(layers[0])
    merged = nnx.merge(layout, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, layers)))
    merged.stacked = len(layers)
    return merged


def is_scanned(layer: nnx.Module) -> bool:
    """Whether `scan` runs this layer in a loop: a `stack` of one it calls as it is."""
    return getattr(layer, "stacked", 1) > 1


def run_layers(stacked: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """`x` through each layer of a `stack`, as `layer(x, *args)`; the result has the shape and dtype of `x`."""
    return scan(stacked, lambda layer, x: layer(x, *args), x)


def scan(stacked: nnx.Module, function: Callable[[nnx.Module, Carry], Carry], carry: Carry) -> Carry:
    """`carry = function(layer, carry)` for each layer of a `stack`, in order; `carry` keeps its shapes and dtypes."""
    layout, state = nnx.split(stacked)
    if not is_scanned(stacked):
        return function(nnx.merge(layout, jax.tree.map(lambda leaf: leaf[0], state)), carry)

    def body(carry, index_and_state):
        index, state = index_and_state
        with layer_noise(index):
            return function(nnx.merge(layout, state), carry), None

    return jax.lax.scan(body, carry, (jnp.arange(stacked.stacked), state))[0]


def depths(network: nnx.Module) -> dict[tuple[str | int, ...], int]:
    """{path: number of layers} of every stack of a network, abstract or not."""
    return {
        tuple(path): module.stacked
        for path, module in nnx.iter_modules(network)
        if getattr(module, "stacked", None) is not None
    }


def numbered(
    path: Sequence[str | int], stacks: dict[tuple[str | int, ...], int]
) -> list[tuple[tuple[str | int, ...], int | None]]:
    """The paths that PyTorch has for what lies at `path` of a network.

    Args:
        path: of a layer or parameter. stacks: the network's `depths`.

    Returns:
        [(path with the number of the layer, that number)] for what is part of a stack; else [(path, None)].
    """
    for length in range(1, len(path) + 1):
        if depth := stacks.get(tuple(path[:length])):
            return [((*path[:length], index, *path[length:]), index) for index in range(depth)]
    return [(tuple(path), None)]
