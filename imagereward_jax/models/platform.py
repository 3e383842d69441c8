"""Which hardware a program is traced for: layers choose kernels and precision by it."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp

_target_platform = contextvars.ContextVar("target_platform", default=None)


@contextlib.contextmanager
def target_platform(platform):
    """Traces what is inside for `platform` ("cpu", "gpu" or "tpu") instead of the default backend.

    Needed where a program is compiled for hardware that this machine does not have.
    """
    token = _target_platform.set(platform)
    try:
        yield
    finally:
        _target_platform.reset(token)


def current_platform():
    """The platform that layers choose their kernels for."""
    return _target_platform.get() or jax.default_backend()


def precision(dtype):
    """Full float32 products for float32 layers (TPUs and GPUs would otherwise round the inputs)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
