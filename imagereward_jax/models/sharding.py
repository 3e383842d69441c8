"""How arrays lie on the devices of a mesh: layers declare it, one by one.

A batch is sharded over all axes of the mesh, a large weight over its axis `fsdp`. A layer all-gathers its weight just
before it uses it. The compiler is told so layer by layer (`gather_weight`, `shard_batch`): by itself it would gather
activations as well.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SMALLEST_SHARDED = 2**14  # elements; a smaller weight is replicated, which costs less than gathering it

_batch_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("batch_mesh", default=None)


@contextlib.contextmanager
def batch_over(mesh: Mesh | None) -> Iterator[None]:
    """Declares that batches in code traced inside are sharded over all axes of `mesh` (None: unknown).

    The compiler splits most operations by itself, but not hand-written TPU kernels.
    """
    token = _batch_mesh.set(mesh)
    try:
        yield
    finally:
        _batch_mesh.reset(token)


def batch_mesh() -> Mesh | None:
    """The mesh that batches are sharded over, or None."""
    return _batch_mesh.get()


def weight_spec(shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """Spec of a weight of this shape: its largest axis that `fsdp` divides is sharded, if there is one."""
    divisible = [axis for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]) if shape[axis] % fsdp == 0]
    if fsdp == 1 or not divisible or math.prod(shape) < SMALLEST_SHARDED:
        return PartitionSpec()
    return PartitionSpec(*(("fsdp" if axis == divisible[0] else None) for axis in range(len(shape))))


def splitting_mesh(batch: int) -> Mesh | None:
    """The mesh that shards `batch` rows evenly, or None if there is none."""
    mesh = batch_mesh()
    return mesh if mesh is not None and mesh.size > 1 and batch % mesh.size == 0 else None


def shard_batch(x: jax.Array) -> jax.Array:
    """Shards the rows of `x` [B, ...] over the devices, and those of its gradient."""
    mesh = splitting_mesh(x.shape[0])
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def shard_weight(weight: jax.Array) -> jax.Array:
    """Shards a weight by `weight_spec`, whatever the compiler would prefer."""
    mesh, spec = batch_mesh(), _batch_spec(weight)
    return weight if spec == PartitionSpec() else jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, spec))


def replicate(x: jax.Array) -> jax.Array:
    """Replicates a small array on every device."""
    mesh = batch_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def gather_weight(weight: jax.Array) -> jax.Array:
    """All-gathers a sharded weight for one layer; its gradient is scattered back by `weight_spec`."""
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
