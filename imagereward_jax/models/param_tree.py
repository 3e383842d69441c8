"""Trees of parameters, {network: nested dict}: masks of trainable leaves, split and join."""

from collections.abc import Collection
from typing import Any

import jax

BUFFERS = ("position_table",)  # names of parameters that are read and exported like the others, and never train


def trainable_mask(params: dict[str, Any], networks: Collection[str], *, lora: bool = False) -> dict[str, Any]:
    """Returns a tree like `params` with True for each trainable parameter, for `optax.masked` and `split`.

    Args:
        networks: names of the networks that train.
        lora: whether only their low-rank parameters train. `BUFFERS` never do.
    """

    def trains(path, _):
        name = str(path[-1].key)
        return path[0].key in networks and name not in BUFFERS and (not lora or name.startswith("lora_"))

    return jax.tree_util.tree_map_with_path(trains, params)


def split(params: dict[str, Any], mask: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits leaves into (trainable, frozen) by `mask`; empty dicts are left out."""
    trainable, frozen = {}, {}
    for name, value in params.items():
        if not isinstance(value, dict):
            (trainable if mask[name] else frozen)[name] = value
            continue
        for tree, part in zip((trainable, frozen), split(value, mask[name])):
            if part:
                tree[name] = part
    return trainable, frozen


def join(frozen: dict[str, Any], trainable: dict[str, Any]) -> dict[str, Any]:
    """Joins the two trees of `split`; if both have a leaf, `trainable` wins."""
    joined = dict(frozen)
    for name, value in trainable.items():
        both = isinstance(value, dict) and isinstance(frozen.get(name), dict)
        joined[name] = join(frozen[name], value) if both else value
    return joined
