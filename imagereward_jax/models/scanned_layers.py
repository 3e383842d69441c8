"""Stacks of equal layers: one layer whose parameters are stacked along a new first axis.

A scan runs the layers one after the other, so a network of 70 transformer blocks compiles as eleven. PyTorch
checkpoints number the layers ("transformer_blocks.3"); `weights.mapping` converts between the two.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models.dropout import layer_noise

Carry = TypeVar("Carry")
Path = tuple[str | int, ...]


class Numbers(NamedTuple):
    """How PyTorch numbers the layers of a stack: "{parent}.{number}" for each of `numbers`."""

    parent: Path
    numbers: range


def stack(layers: Sequence[nnx.Module]) -> nnx.Module:
    """Stacks layers of one class into one layer with the parameters of all; `run_layers` calls it."""
    layout = nnx.graphdef(layers[0])
    merged = nnx.merge(layout, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, layers)))
    merged.stacked = len(layers)
    return merged


def stack_runs(layers: Sequence[nnx.Module], kinds: Sequence[Any]) -> nnx.List:
    """Stacks each run of neighbouring layers of equal kind; returns the list of stacks.

    In PyTorch the layers of all stacks are numbered as one list.
    """
    runs, first = nnx.List([]), 0
    for _, group in itertools.groupby(range(len(layers)), key=kinds.__getitem__):
        run = stack([layers[index] for index in group])
        run.first_layer = first
        runs.append(run)
        first += run.stacked
    return runs


def is_scanned(layer: nnx.Module) -> bool:
    """Whether `scan` runs this layer in a loop; a `stack` of one layer is called directly."""
    return getattr(layer, "stacked", 1) > 1


def run_layers(stacked: nnx.Module, x: jax.Array, *args: Any) -> jax.Array:
    """Applies each layer of a `stack` in turn, as `layer(x, *args)`; the result has the shape and dtype of `x`."""
    return scan(stacked, lambda layer, x: layer(x, *args), x)


def scan(stacked: nnx.Module, function: Callable[..., Carry], carry: Carry, *per_layer: jax.Array) -> Carry:
    """Computes `carry = function(layer, carry, *values)` for each layer of a `stack`.

    Args:
        carry: keeps its shapes and dtypes.
        per_layer: arrays [layers, ...]; `values` are their entries for the layer.
    """
    layout, state = nnx.split(stacked)
    if not is_scanned(stacked):
        layer = nnx.merge(layout, jax.tree.map(lambda leaf: leaf[0], state))
        return function(layer, carry, *(values[0] for values in per_layer))

    def body(carry, inputs):
        index, state, *values = inputs
        with layer_noise(index):
            return function(nnx.merge(layout, state), carry, *values), None

    return jax.lax.scan(body, carry, (jnp.arange(stacked.stacked), state, *per_layer))[0]


def stacks_of(network: nnx.Module) -> dict[Path, Numbers]:
    """Returns {path: numbers of its layers} of every stack of a network, abstract or not."""
    found = {}
    for path, module in nnx.iter_modules(network):
        if (depth := getattr(module, "stacked", None)) is None:
            continue
        first = getattr(module, "first_layer", None)
        path = tuple(path)
        found[path] = Numbers(path, range(depth)) if first is None else Numbers(path[:-1], range(first, first + depth))
    return found


def numbered(path: Sequence[str | int], stacks: dict[Path, Numbers]) -> list[tuple[Path, int | None]]:
    """Expands a path of a network to PyTorch's numbered paths.

    Args:
        path: of a layer or parameter.
        stacks: the network's `stacks_of`.

    Returns:
        [(path with the layer's number, index in its stack)] for each layer of a stack; outside of stacks
        [(path, None)].
    """
    for length in range(1, len(path) + 1):
        if found := stacks.get(tuple(path[:length])):
            return [((*found.parent, number, *path[length:]), index) for index, number in enumerate(found.numbers)]
    return [(tuple(path), None)]
