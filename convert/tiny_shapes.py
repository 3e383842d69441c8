"""Packs a built-in model, `tiny-shapes` or `tiny-shapes-sd3`, from the exports of its recipes, with weights in float16.

    python -m imagereward_jax.train --config configs/shapes_vae.py
    python -m imagereward_jax.train --config configs/shapes_pretrain.py
    python -m imagereward_jax.train --config configs/shapes_reward.py
    python convert/tiny_shapes.py runs/shapes_pretrain/export OUT --reward runs/shapes_reward/export

    python -m imagereward_jax.train --config configs/shapes_vae_sd3.py
    python -m imagereward_jax.train --config configs/shapes_pretrain_sd3.py
    python convert/tiny_shapes.py runs/shapes_pretrain_sd3/export OUT

OUT (imagereward_jax/assets/NAME for the package) is a diffusers folder, a reward in its folder `reward`.
"""

import argparse
import shutil
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def pack(diffusion, out, reward=None, *, overwrite=False):
    """Copies the folders to `out` and rounds every safetensors file to float16."""
    import numpy as np

    from imagereward_jax.storage.folders import new_folder
    from imagereward_jax.weights.files import cast, read_tensors, write_safetensors

    with new_folder(out, overwrite=overwrite, marker="model_index.json") as folder:
        shutil.copytree(diffusion, folder, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
        if reward:
            shutil.copytree(reward, folder / "reward")
        for path in folder.rglob("*.safetensors"):
            write_safetensors(path, cast(read_tensors(path), np.float16, what=str(path)), {"format": "pt"})


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("diffusion", type=Path, help="diffusers folder")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--reward", type=Path, help="folder of a reward to put beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is a diffusers folder")
    args = parser.parse_args(argv)
    pack(args.diffusion, args.out, args.reward, overwrite=args.overwrite)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    say(f"wrote {args.out}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
