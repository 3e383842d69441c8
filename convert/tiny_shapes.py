"""Packs a built-in model from the exports of its recipes, with weights in float16.

    python -m imagereward_jax.train --config configs/shapes_vae.py
    python -m imagereward_jax.train --config configs/shapes_pretrain.py
    python -m imagereward_jax.train --config configs/shapes_reward.py
    python convert/tiny_shapes.py runs/shapes_pretrain/export OUT --reward runs/shapes_reward/export

    python -m imagereward_jax.train --config configs/shapes_vae_sd3.py
    python -m imagereward_jax.train --config configs/shapes_pretrain_sd3.py
    python convert/tiny_shapes.py runs/shapes_pretrain_sd3/export OUT

    python -m imagereward_jax.train --config configs/shapes_reward_samples.py
    python convert/tiny_shapes.py runs/shapes_reward_samples/export OUT

`tiny-shapes`, `tiny-shapes-sd3` and the reward `tiny-shapes-v2`. OUT (imagereward_jax/assets/NAME for the package) is a
diffusers folder, a reward in its folder `reward`; of a reward alone it holds nothing else.
"""

import argparse
import shutil
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def pack(model, out, reward=None, *, overwrite=False):
    """Copies the folders to `out` and rounds every safetensors file to float16; a `model` may be a reward alone."""
    import numpy as np

    from imagereward_jax.storage.folders import new_folder
    from imagereward_jax.weights.files import cast, read_tensors, write_safetensors

    marker, ignored = "model_index.json", shutil.ignore_patterns("README.md", "before_after.jpg")
    if not (model / marker).is_file():
        if reward or not (model / "config.json").is_file():
            raise FileNotFoundError(f"{model}: expected a diffusers folder{'' if reward else ', or that of a reward'}")
        model, reward, marker = None, model, "reward/config.json"
    with new_folder(out, overwrite=overwrite, marker=marker) as folder:
        for source, target in ((model, folder), (reward, folder / "reward")):
            if source:
                shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        for path in folder.rglob("*.safetensors"):
            write_safetensors(path, cast(read_tensors(path), np.float16, what=str(path)), {"format": "pt"})


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="diffusers folder, or that of a reward alone")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--reward", type=Path, help="folder of a reward to put beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that this script wrote")
    args = parser.parse_args(argv)
    pack(args.model, args.out, args.reward, overwrite=args.overwrite)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    say(f"wrote {args.out}: {size / 1e6:.1f} MB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
