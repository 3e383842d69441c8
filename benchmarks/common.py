"""What the benchmarks that compare with PyTorch share: sizes of networks, processes, versions, memory."""

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys

PRESETS = {
    "small": {
        "size": 32,
        "unet": {"block_out_channels": (64, 128, 256), "attention_head_dim": 8, "cross_attention_dim": 128},
        "levels": ("CrossAttn", "CrossAttn", ""),
        "vae": {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
        "tokens": 77,
        "remat": "none",
    },
    "sd15": {
        "size": 64,
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768},
        "levels": ("CrossAttn", "CrossAttn", "CrossAttn", ""),
        "vae": {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
        "tokens": 77,
        "remat": "blocks",
    },
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def unet_config(preset):
    """config.json of the UNet."""
    levels = preset["levels"]
    return {
        "sample_size": preset["size"],
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in levels),
        "up_block_types": tuple(f"{kind}UpBlock2D" if kind else "UpBlock2D" for kind in reversed(levels)),
        **preset["unet"],
    }


def vae_config(preset):
    """config.json of the VAE."""
    count = len(preset["vae"]["block_out_channels"])
    return {
        "sample_size": preset["size"] * 8,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        **preset["vae"],
    }


def resident():
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(script, side, **options):
    """Runs `script --side SIDE --OPTION VALUE ...` in a process of its own; what its last line says."""
    command = [sys.executable, str(script), "--side", side]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {side} failed with {options}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_jax(before):
    """Bytes at most held: by the allocator of the device, or by the process since it held `before` (CPU)."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", resident() - before)


def peak_of_torch(before):
    """The same of PyTorch."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident() - before


def versions(*names):
    """Python's version and those of packages; None for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
