"""Converts a diffusers folder to an Orbax checkpoint, of which each device of a mesh reads only its part.

    python convert/from_diffusers.py SOURCE OUT
    python convert/from_diffusers.py owner/model OUT --variant fp16 --dtype bfloat16

One network at a time is in memory. Every command opens OUT as a model. convert/to_diffusers.py converts it back, in
float32 to the same bits.
"""

import argparse
import os
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="diffusers folder, name on the Hugging Face hub, or built-in model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--variant", help='which weight files to read, e.g. "fp16" for *.fp16.safetensors')
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype to store (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that this command wrote")
    return parser.parse_args(argv)


def convert(source, out, *, variant, dtype, overwrite):
    """Reads, maps and writes one network after the other."""
    from imagereward_jax.pipelines import families
    from imagereward_jax.storage.folders import refuse_existing
    from imagereward_jax.weights import diffusers, orbax
    from imagereward_jax.weights.generation import read_generation

    refuse_existing(out, overwrite=overwrite, marker=orbax.MANIFEST)
    folder = diffusers.resolve_pipeline(source, variant=variant)
    index = diffusers.read_index(folder)
    family = families.family_of(index.pipeline_class, str(folder / diffusers.INDEX))
    classes = families.checked_components(family, index, folder)
    orbax.save_pipeline_checkpoint(
        out,
        (
            read_component(folder, name, class_name, variant=variant, dtype=dtype)
            for name, class_name in classes.items()
        ),
        pipeline_class=family.pipeline_class,
        scheduler_config=diffusers.load_scheduler_config(folder),
        tokenizers=diffusers.tokenizers_of(folder),
        fields=index.fields,
        generation=read_generation(folder),
        overwrite=overwrite,
    )


def read_component(folder, name, class_name, *, variant, dtype):
    """Reads one network: (name, config, params in Flax's layout)."""
    import jax
    import numpy as np

    from imagereward_jax.weights import diffusers, mapping
    from imagereward_jax.weights.components import abstract_network, label
    from imagereward_jax.weights.files import cast

    say(f"{name}: reading")
    config, tensors = diffusers.load_component(folder, name, variant=variant)
    network = abstract_network(class_name, config)
    what = str(folder / name)
    params = mapping.from_torch(network, cast(tensors, jax.numpy.dtype(dtype), what=what), what=what)
    count = sum(array.size for array in jax.tree.leaves(params))
    say(f"{name}: {count:,} parameters, writing as {dtype}")
    # As jax arrays on the CPU, since Orbax makes copies of numpy arrays.
    return (
        name,
        config | label(class_name),
        jax.tree.map(lambda array: jax.device_put(np.ascontiguousarray(array)), params),
    )


@command
def main(argv=None):
    args = parse_args(argv)
    convert(args.source, args.out, variant=args.variant, dtype=args.dtype, overwrite=args.overwrite)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # there is nothing to compute, and other devices may be in use
    sys.exit(main())
