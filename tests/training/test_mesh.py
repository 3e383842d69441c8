"""Which device lies where on the mesh."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

from imagereward_jax.config import ConfigError
from imagereward_jax.training.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What arranging needs to know of a device."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "stand-in"
    process_index: int = 0


def devices(number, slices):
    """Stand-ins for the devices of several slices, in the order of two processes a slice that take turns."""
    order = sorted(range(number), key=lambda index: index % 2)
    return [Device(id=index, slice_index=index * slices // number) for index in order]


def slices_of(mesh):
    return [[device.slice_index for device in row] for row in mesh.devices]


def test_each_slice_holds_whole_rows_of_fsdp():
    """jax's own arrangement (`mesh_utils.create_hybrid_device_mesh`) of 8 devices in 2 slices."""
    assert slices_of(make_mesh(2, 4, devices(8, 2))) == [[0] * 4, [1] * 4]
    assert slices_of(make_mesh(4, 2, devices(8, 2))) == [[0] * 2, [0] * 2, [1] * 2, [1] * 2]


def test_fsdp_may_span_slices():
    mesh = make_mesh(1, 8, devices(8, 2))
    assert mesh.devices.shape == (1, 8) and len({device.id for device in mesh.devices.flat}) == 8


def test_one_slice_keeps_the_order_of_the_devices():
    given = devices(6, 1)
    assert list(make_mesh(-1, 2, given).devices.flat) == given


def test_sizes_that_do_not_divide_the_devices():
    with pytest.raises(ConfigError, match="data=3 x fsdp=2 is not the 8 device"):
        make_mesh(3, 2, devices(8, 2))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which knows a TPU's torus")
def test_neighbours_along_fsdp_are_neighbours_on_a_tpu():
    code = """
from imagereward_jax.planning.topologies import find_topology
from imagereward_jax.training.mesh import make_mesh
for name, chips in (("v5p:2x2x2", 8), ("v4:2x2x1", 4), ("v5e:4x4", 16)):
    devices = find_topology(name).devices()
    assert len(devices) == chips, (name, len(devices))
for row in make_mesh(4, 4, list(devices)).devices:
    assert all(sum(abs(a - b) for a, b in zip(one.coords, two.coords)) == 1 for one, two in zip(row, row[1:])), row
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
