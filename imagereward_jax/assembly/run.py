"""Puts a run together: method, weights, sources; over arrays to be trained, or over shapes to be planned."""

from typing import Any

from jax.sharding import Mesh

from imagereward_jax.assembly import trainable
from imagereward_jax.assembly.given import Given
from imagereward_jax.assembly.parts import Parts
from imagereward_jax.methods.base import find_method
from imagereward_jax.recipes import method_settings
from imagereward_jax.training.program import AssembledRun


def assemble(config: Any, mesh: Mesh, *, abstract: bool = False, given: Given | None = None) -> AssembledRun:
    """The run of a validated config.

    Args:
        config: see `recipes.validate`. mesh: what arrays are sharded over.
        abstract: over shapes: nothing is read but settings, no data, no download; weights are `jax.ShapeDtypeStruct`.
        given: objects that take the place of what the config names.

    Raises:
        ConfigError, FileNotFoundError, ValueError: naming the field, file, row or tensor that cannot be used.
    """
    settings = method_settings(config)
    parts = Parts(config, mesh, abstract=abstract, given=given)
    method = find_method(config.method.name).make(settings, parts)
    parts.__dict__.pop("encoder", None)
    weights = trainable.load(parts, method)
    return AssembledRun(
        method,
        weights.trainable,
        weights.frozen,
        method.export or parts.export(method),
        lambda cast: trainable.reference(parts, weights.trainable, cast),
        tuple(parts.assumptions),
        parts.files,
        parts.license,
    )
