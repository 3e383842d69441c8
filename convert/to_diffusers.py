"""Converts an Orbax checkpoint that convert/from_diffusers.py wrote to a diffusers folder.

    python convert/to_diffusers.py CHECKPOINT OUT

diffusers (`StableDiffusionPipeline`, `StableDiffusionXLPipeline`) and every command of this package open OUT. One
network at a time is in memory. (A training run writes such a folder itself: WORKDIR/export.)
"""

import argparse
import os
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder that convert/from_diffusers.py wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype to write (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is a diffusers folder")
    return parser.parse_args(argv)


def convert(checkpoint, out, *, dtype, overwrite):
    """Reads, maps and writes one network after the other."""
    from imagereward_jax.storage.folders import refuse_existing
    from imagereward_jax.weights import diffusers, orbax
    from imagereward_jax.weights.generation import read_generation

    refuse_existing(out, overwrite=overwrite, marker=diffusers.INDEX)
    manifest = orbax.read_manifest(checkpoint)
    diffusers.save_pipeline(
        out,
        (read_component(checkpoint, name, config, dtype=dtype) for name, config in manifest["components"].items()),
        pipeline_class=manifest["pipeline_class"],
        scheduler_config=manifest["scheduler"],
        tokenizers={name: checkpoint / name for name in manifest["tokenizers"]},
        fields=manifest["fields"],
        generation=read_generation(checkpoint),
        overwrite=overwrite,
    )


def read_component(checkpoint, name, config, *, dtype):
    """Reads one network: (name, (config, tensors)) in PyTorch's names and layout."""
    import jax

    from imagereward_jax.weights import mapping, orbax
    from imagereward_jax.weights.components import abstract_network, class_of
    from imagereward_jax.weights.files import cast

    say(f"{name}: reading")
    network = abstract_network(class_of(config, name), config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), mapping.params_of(network))
    params = orbax.load_pipeline_checkpoint(checkpoint, {name: structs})[name]
    tensors = cast(mapping.to_torch(network, params), jax.numpy.dtype(dtype), what=str(checkpoint / name))
    say(f"{name}: {sum(array.size for array in tensors.values()):,} parameters, writing as {dtype}")
    return name, (config, tensors)


@command
def main(argv=None):
    args = parse_args(argv)
    convert(args.checkpoint, args.out, dtype=args.dtype, overwrite=args.overwrite)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # there is nothing to compute, and other devices may be in use
    sys.exit(main())
