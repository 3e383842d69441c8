"""Hardware by name ("v5e:2x4", "h200:8", "cpu:8"): memory per chip, and devices to compile for without the hardware."""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from imagereward_jax.config import did_you_mean
from imagereward_jax.terminal import say

GIB = 2**30
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
NODES = ("1", "2", "4", "8", "16", "32", "64")
# Slices of each TPU, smallest first, and the memory of a chip (cloud.google.com/tpu/docs, system architecture).
TPUS = {
    "v4": (CUBES, 32 * GIB),
    "v5e": (FLAT, 16 * GIB),
    "v5p": (CUBES, 95 * GIB),
    "v6e": (FLAT, 32 * GIB),
}
# Values that the driver reports for each GPU, and shared memory per multiprocessor; the compiler needs no GPU then.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2039040000000, 41943040, 1.41, 85100068864, 167936),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 3352320000000, 52428800, 1.98, 84942979072, 233472),
    "h200": ("NVIDIA H200", (9, 0), 132, 128, 4800000000000, 62914560, 1.98, 150000000000, 233472),
    "b200": ("NVIDIA B200", (10, 0), 148, 128, 7672320000000, 132644864, 1.965, 191514411008, 233472),
}
GPUS_A_NODE = 8
GPU_USABLE = 0.95  # share of a GPU's memory for XLA; the rest is used by CUDA, cuDNN and NCCL


class TopologyError(ValueError):
    """The hardware is unknown, or its compiler is not installed; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Hardware to compile for.

    platform: "tpu", "gpu" or "cpu"; layers choose their kernels by it. chips: number of chips. hbm_bytes: memory per
    chip; usable_bytes: its part for programs.
    """

    name: str
    platform: str
    chips: int
    hbm_bytes: int
    usable_bytes: int

    def devices(self) -> Sequence[Any]:
        """Returns devices to build a mesh of.

        Raises:
            TopologyError: the compiler for this hardware is not installed, or rejects it.
        """
        kind, _, shape = self.name.partition(":")
        try:
            if self.platform == "tpu":
                return _tpu_devices(self.name)
            return _gpu_devices(kind, self.chips) if self.platform == "gpu" else _cpu_devices(int(shape))
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            raise TopologyError(f"--topology {self.name}: {str(error).splitlines()[0]}") from error


def find_topology(name: str) -> Topology:
    """Returns the `Topology` of this name.

    Raises:
        TopologyError: the name is unknown; the message suggests the nearest names.
    """
    kind, _, shape = str(name).partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(shape)
        return Topology(name, "cpu", int(shape), memory, memory)
    if name not in known_names():
        near = [known for known in known_names() if known.startswith(f"{kind}:")] if kind in {**TPUS, **GPUS} else []
        listed = f"; {kind} comes as {', '.join(near)}" if near else f"; kinds: {', '.join([*TPUS, *GPUS, 'cpu'])}"
        raise TopologyError(f"--topology {name}: unknown{did_you_mean(name, known_names())}{listed}")
    if kind in TPUS:
        hbm = TPUS[kind][1]
        # libtpu keeps 1/64 of the memory for itself: it gives a v5e program 15.75 GiB
        return Topology(name, "tpu", math.prod(map(int, shape.split("x"))), hbm, hbm - hbm // 64)
    hbm = GPUS[kind][7]
    return Topology(name, "gpu", int(shape), hbm, int(hbm * GPU_USABLE))


def known_names() -> list[str]:
    """Returns all names that `find_topology` knows, except other numbers of CPU devices."""
    slices = [f"{kind}:{shape}" for kind, (shapes, _) in TPUS.items() for shape in shapes]
    return [*slices, *(f"{kind}:{number}" for kind in GPUS for number in NODES), "cpu:1", "cpu:8"]


def sizes_of_kind(name: str) -> list[Topology]:
    """Returns the topologies of the same kind of chip, smallest first."""
    kind = name.partition(":")[0]
    return [find_topology(known) for known in known_names() if known.startswith(f"{kind}:")]


def _tpu_devices(name):
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology {name}: compiling for TPUs needs libtpu: pip install 'imagereward-jax[tpu]', or libtpu alone"
        )
    # Otherwise libtpu queries the metadata server of a cloud machine, and rejects a second plan at the same time.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    if unfit := _libtpu_unfit():
        say(f"warning: {unfit}", file=sys.stderr)
    # the two cores of a v4 chip are one device, as a run on one sees them
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # otherwise four
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _libtpu_unfit():
    """Returns a warning if libtpu is not of the version that jax was made for; else None."""
    found = [re.match(r"libtpu==([\d.]+?)(\.\*)?\s*(;|$)", text) for text in metadata.requires("jax") or ()]
    wanted, there = next((match[1] for match in found if match), None), metadata.version("libtpu")
    if wanted is None or f"{there}.".startswith(f"{wanted}."):
        return None
    return (
        f"libtpu {there} is installed, jax {jax.__version__} was made for {wanted}: if the step does not compile, "
        f"pip install 'libtpu=={wanted}.*'"
    )


def _gpu_devices(kind, chips):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise TopologyError(
            f"--topology {kind}:{chips}: compiling for NVIDIA GPUs needs jax's CUDA plugin: pip install "
            "'imagereward-jax[cuda13]', or jax-cuda13-plugin and jax-cuda13-pjrt of jax's version and nvidia-cudnn-cu13"
        )
    from jax.experimental import topologies

    a_node = min(chips, GPUS_A_NODE)
    options = {"topology": f"1x{chips // a_node}x{a_node}", "target_config": target_config(kind)}
    return topologies.get_topology_desc(platform="cuda", topology_name=kind, **options).devices


def _cpu_devices(number):
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise TopologyError(
            f"--topology cpu:{number}: this process has {len(devices)} CPU device(s); "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={number} before it starts"
        )
    return devices[:number]


def target_config(kind: str) -> str:
    """Formats XLA's description of a GPU (GpuTargetConfigProto as text)."""
    name, (major, minor), cores, fpus, bandwidth, l2, clock, memory, shared = GPUS[kind]
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": fpus,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": bandwidth,
        "l2_cache_size": l2,
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {field}: {value}" for field, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    versions = "dnn_version_info { major: 9 minor: 12 patch: 0 }\nruntime_version { major: 13 }"
    body = "\n".join(lines)
    return f'gpu_device_info {{\n{body}\n}}\nplatform_name: "CUDA"\n{versions}\ndevice_description_str: "{name}"\n'
