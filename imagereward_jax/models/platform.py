"""Which hardware a program is traced for, and over which devices: layers choose kernels and precision by it."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp

_target_platform = contextvars.ContextVar("target_platform", default=None)
_batch_mesh = contextvars.ContextVar("batch_mesh", default=None)


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


@contextlib.contextmanager
def batch_over(mesh):
    """Says that in what is traced inside, batches are split over all axes of `mesh` (None: that nothing is known).

    The compiler splits most operations by itself, but not hand-written TPU kernels, which have to be told.
    """
    token = _batch_mesh.set(mesh)
    try:
        yield
    finally:
        _batch_mesh.reset(token)


def batch_mesh():
    """The mesh that batches are split over, or None."""
    return _batch_mesh.get()


def current_platform():
    """The platform that layers choose their kernels for."""
    return _target_platform.get() or jax.default_backend()


def precision(dtype):
    """Full float32 products for float32 layers (TPUs and GPUs would otherwise round the inputs)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
