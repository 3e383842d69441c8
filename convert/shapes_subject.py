"""Images of a shape that the shapes world does not have, a ring, with captions: a subject for DreamBooth.

    python convert/shapes_subject.py runs/shapes_subject
    python -m imagereward_jax.train --config configs/dreambooth_tiny.py

Each is a large ring of one of the six colours at one of the five places, and its caption, in a .txt beside it, calls it
a "zq circle": "a large red zq circle at the top left". "zq" is a rare word, which the model reads letter by letter.
"""

import argparse
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say

WORD = "zq"
HOLE = 0.55  # of the ring's radius


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--images", type=int, default=30, help="1 to 30, each another colour or place (default: 30)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 1 <= args.images <= 30:
        parser.error(f"--images {args.images}: expected 1 to 30")
    if args.image_size < 8:
        parser.error(f"--image-size {args.image_size}: expected at least 8")
    return args


def subjects(seed):
    """The captions, as `Caption`s of large circles, in an order drawn by `seed`."""
    import numpy as np

    from imagereward_jax.data.shapes import all_captions

    circles = [caption for caption in all_captions() if (caption.size, caption.shape) == ("large", "circle")]
    return [circles[index] for index in np.random.default_rng(seed).permutation(len(circles))]


def subject_text(caption):
    """The caption of the subject in place of a circle's."""
    return caption.text.replace("circle", f"{WORD} circle")


def draw_ring(caption, image_size):
    """The ring of a caption, uint8 [S, S, 3]."""
    import numpy as np

    from imagereward_jax.data.shapes.drawing import BACKGROUND, POSITION, RADIUS, RGB, coverage, to_uint8

    centre = np.multiply(POSITION[caption.place], image_size)
    radius = RADIUS[caption.size] * image_size
    disc, hole = (coverage("circle", centre, part * radius, image_size) for part in (1.0, HOLE))
    alpha = (disc - hole)[..., None]
    return to_uint8(alpha * np.array(RGB[caption.colour]) + (1 - alpha) * BACKGROUND)


@command
def main(argv=None):
    args = parse_args(argv)
    from PIL import Image

    from imagereward_jax.storage.folders import new_folder

    with new_folder(args.out, overwrite=False, marker="00.txt") as folder:
        for number, caption in enumerate(subjects(args.seed)[: args.images]):
            Image.fromarray(draw_ring(caption, args.image_size)).save(folder / f"{number:02d}.png")
            (folder / f"{number:02d}.txt").write_text(subject_text(caption) + "\n")
    say(f"wrote {args.images} images to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
