"""Converts an ImageReward.pt to a folder that `imagereward_jax.load` reads without PyTorch.

    python convert/imagereward.py ImageReward.pt OUT --tokenizer vocab.txt

OUT holds config.json, model.safetensors (PyTorch's key names) and vocab.txt.
"""

import argparse
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="ImageReward.pt, or the name of a known model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--med-config", help="med_config.json; default: beside the checkpoint")
    parser.add_argument("--tokenizer", help="BERT vocab.txt or its folder; default: beside the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an existing OUT")
    return parser.parse_args(argv)


@command
def main(argv=None):
    from imagereward_jax.rewards import checkpoint

    args = parse_args(argv)
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; pass --overwrite to replace the files in it")
    model = checkpoint.load(args.source, device="cpu", med_config=args.med_config, tokenizer=args.tokenizer)
    model.save(args.out, overwrite=args.overwrite)
    say(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
