"""The hardware that a program is traced for: layers choose kernels and precision by it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_target_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("target_platform", default=None)


@contextlib.contextmanager
def target_platform(platform: str) -> Iterator[None]:
    """Traces the code inside for `platform` ("cpu", "gpu" or "tpu") instead of the default backend.

    Needed to compile for hardware that this machine does not have.
    """
    token = _target_platform.set(platform)
    try:
        yield
    finally:
        _target_platform.reset(token)


def current_platform() -> str:
    """The platform that layers choose their kernels for."""
    return _target_platform.get() or jax.default_backend()


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Returns full precision for float32 layers; TPUs and GPUs would otherwise round the inputs of products."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
