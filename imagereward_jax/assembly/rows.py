"""Rows of data as the compiled step takes them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from imagereward_jax.methods.base import HOST, Batch
from imagereward_jax.pipelines.sdxl import make_time_ids


def rows_spec(batch: Batch, rows: int) -> Batch:
    """The shapes of `rows` rows of what a small `batch` has."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct((rows, *np.shape(array)[1:]), array.dtype), batch)


def pair_batch(pipeline: Any, batch: Batch) -> Batch:
    """A stacked batch of pairs with token ids, and for SDXL the sizes of the images if they are known."""
    inputs = {"image": batch["image"], "ids": pipeline.tokenize(batch["prompt"]), HOST: {"prompt": batch["prompt"]}}
    if pipeline.micro_conditioned and "original_size" in batch:
        size = np.broadcast_to(np.array(batch["image"].shape[1:3], np.int32), batch["original_size"].shape)
        inputs["time_ids"] = make_time_ids(batch["original_size"], batch["crop_top_left"], size)
    return inputs


def nested_cond(row: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions among the arrays of a cache, {"cond.NAME": array} as {NAME: array}."""
    return {name.removeprefix("cond."): array for name, array in row.items() if name.startswith("cond.")}
