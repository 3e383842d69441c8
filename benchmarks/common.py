"""Parts that the benchmarks share: sizes of networks, processes, versions, memory."""

import importlib.metadata
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from imagereward_jax.pipelines.families import SD1, SDXL

SMALL_UNET = {"block_out_channels": [64, 128, 256], "sample_size": 32, "cross_attention_dim": 128}
SMALL_VAE = SD1["vae"] | {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "sample_size": 256}
# config.json of the networks, and what is recomputed in the backward pass
PRESETS = {
    "small": {
        "unet": SMALL_UNET
        | {
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 8,
        },
        "vae": SMALL_VAE,
        "remat": "none",
    },
    "small-sdxl": {
        "unet": SMALL_UNET
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 4, 8],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 128 + 6 * 32,
        },
        "vae": SMALL_VAE | {"scaling_factor": 0.13025},
        "remat": "blocks",
    },
    "sd15": {"unet": SD1["unet"], "vae": SD1["vae"], "remat": "blocks"},
    "sdxl": {"unet": SDXL["unet"], "vae": SDXL["vae"], "remat": "blocks"},
}
TOKENS = 77  # of a prompt
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def resident():
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(script, side, **options):
    """Runs `script --side SIDE --OPTION VALUE ...` in a process of its own; returns the JSON of its last line."""
    command = [sys.executable, str(script), "--side", side]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {side} failed with {options}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def matrix_products_a_second(dtype):
    """FLOP/s of a large product of random square matrices on jax's device, the reference for utilisation."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    left, right = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        product(left, right).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def longest_operations(folder, count=12):
    """Operations that took most of the device's time in a trace that `jax.profiler` wrote.

    Args:
        folder: the folder given to `jax.profiler.trace`.

    Returns:
        [(name without its number, share of the time of all, times it ran)], the longest first; empty for a CPU, whose
        trace has no plane of a device.
    """
    from jax.profiler import ProfileData

    seconds, runs = Counter(), Counter()
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:"):
                continue
            lines = [line for line in plane.lines if line.name == "XLA Ops" or line.name.startswith("Stream")]
            for event in (event for line in lines for event in line.events):
                name = re.sub(r"[._]\d+$", "", event.name)
                seconds[name] += event.duration_ns / 1e9
                runs[name] += 1
    total = seconds.total()
    return [(name, round(taken / total, 4), runs[name]) for name, taken in seconds.most_common(count)]


def peak_of_jax(before):
    """Peak bytes: of the device's allocator, or on the CPU of the process beyond the `before` that it held."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", resident() - before)


def peak_of_torch(before):
    """Peak bytes of PyTorch, measured as `peak_of_jax` does."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident() - before


def versions(*names):
    """Versions of Python and of packages; None for a package that is not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
