"""The device mesh and what lies where on it.

Two axes: `data` splits the batch; `fsdp` splits the batch too, and also every large weight with its moments.
"""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imagereward_jax.models.sharding import weight_spec
from imagereward_jax.training.config import ConfigError


def make_mesh(data, fsdp, devices=None):
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


def replicated(mesh):
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def weight_shardings(mesh, tree):
    """A sharding for each array (or shape) of `tree`, by `weight_spec`."""
    size = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(leaf.shape, size)), tree)


def check_batch(mesh, batch_size, accumulation):
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


def check_remat(mesh, remat):
    """Refuses to keep activations in the host's memory for devices that have no other.

    Raises:
        ConfigError: naming the field and what to pass.
    """
    if remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            "config.model.remat='offload': CPU devices have no memory but the host's, so nothing would be saved; pass "
            "--config.model.remat=blocks, which recomputes the same"
        )


def put_batch(mesh, batch):
    """This process's rows of a batch (nested dict of numpy arrays) as global arrays, sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch)


def put_whole(mesh, tree):
    """Arrays that every process holds whole, sharded over the mesh along their leading axis."""
    sharding = batch_sharding(mesh)

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)
