"""Trees of parameters, {network: nested dict}: what of them trains, splitting by that, and putting together again."""

from collections.abc import Collection
from typing import Any

import jax


def trainable_mask(params: dict[str, Any], networks: Collection[str], *, lora: bool = False) -> dict[str, Any]:
    """A tree of the structure of `params`, True where a parameter trains: `optax.masked` takes it, `split` divides by
    it.

    Args:
        networks: names of those that train.
        lora: of these the low-rank parameters alone.
    """

    def trains(path, _):
        return path[0].key in networks and (not lora or str(path[-1].key).startswith("lora_"))

    return jax.tree_util.tree_map_with_path(trains, params)


def split(params: dict[str, Any], mask: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): the leaves where `mask` is true, and the others, in nested dicts without empty ones."""
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
    """The tree that `split` divided. Where both have a leaf, it is `trainable`'s."""
    joined = dict(frozen)
    for name, value in trainable.items():
        both = isinstance(value, dict) and isinstance(frozen.get(name), dict)
        joined[name] = join(frozen[name], value) if both else value
    return joined
