"""Converts a model to a checkpoint of one file in Stability's layout, or such a file to a diffusers folder.

    python convert/single_file.py model.safetensors FOLDER
    python convert/single_file.py FOLDER model.safetensors
    python convert/single_file.py sd3.5_medium.safetensors FOLDER --parts text_encoder=clip_l.safetensors,...

SRC is any model that the commands take. OUT is a file if its name ends in .safetensors. Without --dtype every number
stays as it is, to the bit; a folder also gets the settings and tokenizers of the published model.
"""

import argparse
import os
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", help="model: single file, diffusers folder, built-in model or name on the hub")
    parser.add_argument("out", type=Path, help="file (.safetensors) or folder to write")
    parser.add_argument("--variant", help='"ema" for the averaged weights of a file, "fp16" for those of a folder')
    parser.add_argument("--parts", default="", metavar="NAME=PATH,...", help="networks and tokenizers from elsewhere")
    parser.add_argument("--prediction-type", help="what a file of Stable Diffusion 2 predicts: epsilon or v_prediction")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the file (default: as in SRC)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser.parse_args(argv)


def convert(args):
    """Opens the model and writes it in the other form."""
    from imagereward_jax.pipelines import open_pipeline
    from imagereward_jax.weights import files, single_file

    options = {"variant": args.variant, "parts": args.parts, "prediction_type": args.prediction_type}
    if args.out.suffix != ".safetensors":
        if args.dtype:
            raise ValueError("--dtype is of a file; a folder keeps the numbers that it is made from")
        open_pipeline(args.src, **options).save(args.out, {}, overwrite=args.overwrite)
        return
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} is there; pass --overwrite to replace it")
    pipeline = open_pipeline(args.src, **options)
    networks = {name: (net, pipeline.source.tensors(name, net)) for name, net in pipeline.networks.items()}
    tensors = single_file.to_single_file(pipeline.pipeline_class, networks)
    if args.dtype:
        tensors = files.cast(tensors, args.dtype, what=args.src)
    files.write_safetensors(args.out, tensors)


@command
def main(argv=None):
    args = parse_args(argv)
    convert(args)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # there is nothing to compute, and other devices may be in use
    sys.exit(main())
