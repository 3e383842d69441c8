"""Which hardware a program is traced for, and over which devices: layers choose kernels and precision by it, and say
how their arrays lie on the devices.

A batch is split over all axes of the mesh; a large weight over its axis `fsdp`, and gathered for as long as one layer
needs it. The compiler is told so layer by layer (`whole`, `pinned`): left to itself it gathers activations as well.
"""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

SMALLEST_SHARDED = 2**14  # elements; below that a copy on every device costs less than gathering it

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


def weight_spec(shape, fsdp):
    """How a weight of this shape lies on `fsdp` devices: its largest axis that they divide is split, else none is."""
    divisible = [axis for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]) if shape[axis] % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    return PartitionSpec(*(("fsdp" if axis == divisible[0] else None) for axis in range(len(shape))))


def splitting_mesh(batch):
    """The mesh over whose devices arrays of `batch` rows are split evenly; None where there is no such mesh."""
    mesh = batch_mesh()
    return mesh if mesh is not None and mesh.size > 1 and batch % mesh.size == 0 else None


def pinned(x):
    """`x` [B, ...], each device with its rows of the batch, and its gradient too."""
    mesh = splitting_mesh(x.shape[0])
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def divided(weight):
    """A weight as `weight_spec` divides it over the devices, whatever the compiler would rather do."""
    mesh, spec = batch_mesh(), _batch_spec(weight)
    return weight if spec == PartitionSpec() else jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, spec))


def everywhere(x):
    """A small array on every device whole, from here on."""
    mesh = batch_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def whole(weight):
    """A weight on every device whole, as a layer uses it; its gradient is summed into the parts of `weight_spec`."""
    spec = _batch_spec(weight)
    return weight if spec == PartitionSpec() else _gathered(batch_mesh(), spec, weight)


def _batch_spec(weight):
    mesh = batch_mesh()
    return PartitionSpec() if mesh is None else weight_spec(weight.shape, mesh.shape.get("fsdp", 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(mesh, spec, weight):
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))


def _gathered_forward(mesh, spec, weight):
    return _gathered(mesh, spec, weight), None


def _gathered_backward(mesh, spec, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, spec)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
