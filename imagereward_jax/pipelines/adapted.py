"""Weights to sample with: a model with adapters added, and the base model beside it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.pipelines.base import Params, TextToImage
from imagereward_jax.weights import adapters


def load_params(
    pipeline: TextToImage, loras: Sequence[tuple[str, float]], dtype: str, *, keep_base: bool = False
) -> tuple[Params, Params | None]:
    """Loads a model's weights in `dtype`, with adapters [(path, weight)] merged in float32 beforehand.

    Returns:
        (the weights, with `keep_base` the adapted components without the adapters, else None).

    Raises:
        FileNotFoundError, ValueError: weights or an adapter are absent, or do not fit the model.
    """
    read = [(adapters.read_adapter(path, pipeline.networks), weight) for path, weight in loras]
    adapted = {name for adapter, _ in read for name in adapter}

    def struct(name):
        held = np.dtype(np.float32 if name in adapted else jnp.dtype(dtype))
        return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, held)

    target = {name: jax.tree.map(struct(name), tree) for name, tree in pipeline.abstract_params().items()}
    params = pipeline.load_params(target)
    base = {name: params[name] for name in adapted} if keep_base else None
    for adapter, weight in read:
        params = adapters.merge(pipeline.networks, params, adapter, weight)
    return tuple(
        jax.tree.map(lambda array: array.astype(jnp.dtype(dtype), copy=False), tree) for tree in (params, base)
    )


def load_base(pipeline: TextToImage, base: TextToImage, params: Params, dtype: str, what: str) -> Params:
    """Loads the components of `base` that predict noise and differ from those of a tuned model: the denoiser, and text
    encoders whose weights are not equal. What decodes images is the tuned model's.

    Args:
        params: of the tuned model. what: how errors name the base model.

    Raises:
        FileNotFoundError, ValueError: its weights are absent, or it is not of the tuned model's architecture.
    """
    names = (pipeline.denoiser, *pipeline.text_encoders)
    if base.family != pipeline.family:
        raise ValueError(f"{what} is of the family {base.family}, the tuned model of {pipeline.family}")
    for name in names:
        if base.configs[name] != pipeline.configs[name]:
            ours, theirs = (model.configs[name].to_dict() for model in (pipeline, base))
            field = next(field for field in ours if ours[field] != theirs.get(field))
            raise ValueError(
                f"{what} has another {name} than the tuned model: {field}={theirs.get(field)!r}, not {ours[field]!r}"
            )
    if base.schedule.prediction_type != pipeline.schedule.prediction_type:
        raise ValueError(
            f"{what} predicts {base.schedule.prediction_type}, the tuned model {pipeline.schedule.prediction_type}"
        )
    shapes = base.abstract_params()
    held = jnp.dtype(dtype)
    target = {name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, held), shapes[name]) for name in names}
    loaded = base.load_params(target)
    return {name: tree for name, tree in loaded.items() if name == base.denoiser or not _equal(tree, params[name])}


def _equal(one: Any, other: Any) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))
