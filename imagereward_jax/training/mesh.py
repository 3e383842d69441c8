"""The device mesh and what lies where on it.

Two axes: `data` splits the batch; `fsdp` splits the batch too, and also every large weight with its moments.
"""

import json
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import HOST
from imagereward_jax.models.sharding import weight_spec


def make_mesh(data: int, fsdp: int, devices: list | None = None) -> Mesh:
    """A mesh ("data", "fsdp") over `devices` (default: all), neighbours along fsdp as near as they can be.

    Of several TPU slices (or groups of GPUs that jax knows as such) each holds whole rows of fsdp, so that only
    gradients cross the slower network between them, if data is a multiple of their number; else the order is that of
    the processes. Within a TPU slice the order follows its torus.

    Args:
        data, fsdp: sizes of the axes; data=-1 takes the devices that fsdp leaves.

    Raises:
        ConfigError: the devices do not divide so.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = max(1, len(devices) // fsdp)
    if data * fsdp != len(devices):
        raise ConfigError(
            f"config.mesh: data={data} x fsdp={fsdp} is not the {len(devices)} device(s) of this run; "
            "choose sizes whose product is that, or data=-1 with an fsdp that divides it"
        )
    return Mesh(_arranged(list(devices), data, fsdp), ("data", "fsdp"))


def _arranged(devices, data, fsdp):
    """`devices` as an array [data, fsdp]; see `make_mesh`."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and data % slices == 0:
        inner, outer = (data // slices, fsdp), (slices, 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if slices == 1 and devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(data, fsdp)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each array (or shape) of `tree`, by `weight_spec`."""
    size = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(leaf.shape, size)), tree)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Refuses a batch that the devices do not divide.

    Raises:
        ConfigError: naming the sizes and the nearest batch that works.
    """
    parts = mesh.size * accumulation
    if batch_size % parts:
        raise ConfigError(
            f"config.batch_size={batch_size} is not divisible by {mesh.size} device(s) x "
            f"config.accumulation={accumulation}; the next size that is: {-(-batch_size // parts) * parts}"
        )


def check_remat(mesh: Mesh, remat: str) -> None:
    """Refuses to keep activations in the host's memory for devices that have no other.

    Raises:
        ConfigError: naming the field and what to pass.
    """
    if remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            "config.model.remat='offload': CPU devices have no memory but the host's, so nothing would be saved; pass "
            "--config.model.remat=blocks, which recomputes the same"
        )


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, Any]:
    """This process's rows of a batch (nested dict of NumPy arrays) as global arrays, sharded over the mesh; what is
    under "host" is left out."""
    sharding = batch_sharding(mesh)

    def put(value):
        if isinstance(value, dict):
            return {name: put(part) for name, part in value.items() if name != HOST}
        return jax.make_array_from_process_local_data(sharding, np.asarray(value))

    return put(batch)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded as `put_batch` does."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def from_all_processes(value: Any) -> list[Any]:
    """A value of each process, in their order; it has to be one that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def put_replicated_rows(mesh: Mesh, tree: Any) -> Any:
    """Arrays that every process holds in full, sharded over the mesh along their leading axis."""
    sharding = batch_sharding(mesh)

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def host_copy(components: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The named components for process 0 to write; other processes get empty ones.

    In one process arrays stay as they are, for whoever reads them one by one. Of several, all take part: each array is
    gathered by itself and leaves the devices before the next one.
    """
    chosen = {name: components[name] for name in names}
    if jax.process_count() == 1:
        return chosen
    from jax.experimental import multihost_utils

    def gather(leaf):
        whole = np.asarray(leaf) if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(whole) if jax.process_index() == 0 else None

    gathered = jax.tree.map(gather, chosen)
    return gathered if jax.process_index() == 0 else {}
