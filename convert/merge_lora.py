"""Merges an adapter (LoRA) into a model's weights.

    python convert/merge_lora.py SRC LORA OUT [--weight 0.8]

SRC is any model that the commands take; LORA an adapter of diffusers, PEFT, kohya's sd-scripts, LyCORIS, ComfyUI,
OneTrainer or a training run of this package. OUT is a diffusers folder of float32 weights, which PyTorch opens as well.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="model: diffusers folder, single file, built-in model or name on the hub")
    parser.add_argument("lora", help="adapter: .safetensors file, its folder, or name on the hub")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--weight", type=float, default=1.0, help="factor on the adapter (default: %(default)s)")
    parser.add_argument("--variant", help='which weights of the model to read: "fp16", of a single file "ema"')
    parser.add_argument("--parts", default="", metavar="NAME=PATH,...", help="networks and tokenizers from elsewhere")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is a diffusers folder")
    return parser.parse_args(argv)


def merge(args):
    """Reads both, merges and writes; returns the number of layers in the adapter."""
    from imagereward_jax.pipelines import load_pipeline
    from imagereward_jax.storage.folders import refuse_existing
    from imagereward_jax.weights import adapters, diffusers

    if not math.isfinite(args.weight):
        raise ValueError(f"--weight {args.weight} should be a number, usually from 0 to 1")
    refuse_existing(args.out, overwrite=args.overwrite, marker=diffusers.INDEX)
    pipeline, params = load_pipeline(args.src, variant=args.variant, parts=args.parts)
    adapter = adapters.read_adapter(args.lora, pipeline.networks)
    params = adapters.merge(pipeline.networks, params, adapter, args.weight)
    pipeline.save(args.out, params, overwrite=args.overwrite)
    return sum(len(layers) for layers in adapter.values())


@command
def main(argv=None):
    args = parse_args(argv)
    count = merge(args)
    say(f"wrote {args.out}: {count} layers adapted")
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # there is nothing to compute, and other devices may be in use
    sys.exit(main())
