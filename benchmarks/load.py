"""Measures host memory and bytes read while the weights of a pipeline are loaded in bfloat16.

    python benchmarks/load.py --work /tmp/load                  # an SDXL of random weights: 7 GB of disk and of memory
    python benchmarks/load.py --work /tmp/load --size small
    python benchmarks/load.py --work /tmp/load --size sd35-large --parts text_encoder_3     # T5 alone, 9.5 of 26 GB

Writes a diffusers folder of random bfloat16 weights, then loads it in two fresh processes: as NumPy arrays, and onto 8
virtual devices with fsdp=8. Each prints a line of JSON: the peaks of anonymous memory and of the resident size against
the weights' size, and the bytes that each device's part takes from the files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the model; an existing model is used again"
    )
    parser.add_argument("--size", choices=("sdxl", "small", "sd35-medium", "sd35-large"), default="sdxl")
    parser.add_argument("--parts", nargs="+", help="components that are loaded; default: all")
    parser.add_argument("--side", choices=("write", "numpy", "sharded"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write(folder, size):
    """Writes random weights as a diffusers folder, one component in memory at a time."""
    import ml_dtypes
    import numpy as np
    from common import PRESETS

    from imagereward_jax.data.shapes.tokenizers import write_clip_tokenizer, write_t5_tokenizer
    from imagereward_jax.models.clip import VIT_L
    from imagereward_jax.pipelines.families import PUBLISHED, SDXL, from_architecture
    from imagereward_jax.weights import diffusers, mapping

    flow = size.startswith("sd35")
    scheduler = {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1}
    if flow:
        scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    small = {"unet": PRESETS["small"]["unet"] | {"cross_attention_dim": 64}, "vae": PRESETS["small"]["vae"]}
    small |= {"text_encoder": VIT_L | {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}}
    sizes = {"sdxl": SDXL, "small": small}
    sizes |= {f"sd35-{name}": PUBLISHED[f"stabilityai/stable-diffusion-3.5-{name}"][1] for name in ("medium", "large")}
    with tempfile.TemporaryDirectory() as clip, tempfile.TemporaryDirectory() as t5:
        write_clip_tokenizer(clip)
        write_t5_tokenizer(t5)
        tokenizers = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5} if flow else clip
        pipeline = from_architecture(sizes[size] | {"scheduler": scheduler}, tokenizers)

        def networks():
            for name, network in pipeline.networks.items():
                rng, tensors = np.random.default_rng(0), {}
                for key, leaf in mapping.torch_layout(network).items():
                    bits = rng.integers(0x3C00, 0x3D00, leaf.torch_shape, np.uint16)  # from 0.008 to 0.03
                    tensors[key] = bits.view(ml_dtypes.bfloat16)
                yield name, (pipeline.component_config(name), tensors)

        diffusers.save_pipeline(
            folder,
            networks(),
            pipeline_class=pipeline.pipeline_class,
            scheduler_config=pipeline.scheduler_config,
            tokenizers=pipeline.tokenizer_folders,
        )


class Peak(threading.Thread):
    """Samples this process's anonymous memory every 10 ms and keeps the largest."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = anonymous()

    def run(self):
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.01)


def anonymous():
    """Bytes of anonymous memory that are resident (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(folder, sharded, parts):
    """Loads components in bfloat16; returns the figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from common import resident
    from jax.sharding import Mesh, NamedSharding

    from imagereward_jax.models.sharding import weight_spec
    from imagereward_jax.pipelines import open_pipeline
    from imagereward_jax.weights.files import StoredTensor

    devices = np.array(jax.devices())
    mesh = Mesh(devices.reshape(1, -1), ("data", "fsdp"))
    read, whole = [], StoredTensor.__getitem__

    def counted(tensor, index):
        part = whole(tensor, index)
        read.append(part.nbytes)
        return part

    StoredTensor.__getitem__ = counted
    pipeline = open_pipeline(folder, dtype="bfloat16")

    def struct(leaf):
        spec = NamedSharding(mesh, weight_spec(leaf.shape, devices.size)) if sharded else None
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=spec)

    shapes = pipeline.abstract_params()
    target = jax.tree.map(struct, {name: shapes[name] for name in parts or shapes})
    before, peak = anonymous(), Peak()
    peak.start()
    start = time.perf_counter()
    leaves = jax.block_until_ready(jax.tree.leaves(pipeline.load_params(target)))
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in leaves)
    return {
        "sharded_over": int(devices.size) if sharded else 0,
        "weights_bytes": weights,
        "anonymous_peak_over_weights": round((peak.bytes - before) / weights, 3),
        "resident_peak_bytes": resident(),
        "resident_peak_over_weights": round(resident() / weights, 3),
        "bytes_read": sum(read),
        "bytes_read_per_device": sum(read) // devices.size,
        "seconds": round(seconds, 1),
    }


def main():
    args = parse_args()
    folder = args.work / args.size
    if args.side == "write":
        write(folder, args.size)
        return
    if args.side:
        figures = load(folder, args.side == "sharded", args.parts)
        print(json.dumps({"size": args.size, "parts": args.parts or "all"} | figures))
        return
    sides = ["numpy", "sharded"] if folder.is_dir() else ["write", "numpy", "sharded"]
    for side in sides:
        flags = "--xla_force_host_platform_device_count=8" if side == "sharded" else ""
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, "--work", str(args.work), "--size", args.size, "--side", side]
        command += ["--parts", *args.parts] if args.parts else []
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
