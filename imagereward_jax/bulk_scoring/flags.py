"""The flags of commands that score images, and what they mean for `scorers.open_scorer`."""

import argparse
from typing import Any


def add_scorer_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size, --dtype, --tokenizer and --image-rule."""
    from imagereward_jax.data.images import IMAGE_RULES

    parser.add_argument("--batch-size", type=int, default=16, help="images at a time")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokenizer", help="vocabulary or its folder; default: the model's own")
    parser.add_argument(
        "--image-rule",
        default="shown",
        choices=IMAGE_RULES,
        help="original: read odd images as ImageReward's code does",
    )


def scorer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `open_scorer` that these flags give."""
    return {name: getattr(args, name) for name in ("batch_size", "dtype", "tokenizer", "image_rule")}
