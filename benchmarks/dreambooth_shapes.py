"""What DreamBooth taught a shapes model, and what it cost: rings under the rare word, and the class without it.

    python benchmarks/dreambooth_shapes.py tiny-shapes runs/dreambooth_tiny/export

Prints Markdown. Rings: share of images of "zq circle" prompts that show one, for the 20 captions that
`convert/shapes_subject.py --images 20` draws and the 10 that it leaves out. Circles: share of images of the same
prompts without the word that the rule-based checker finds fully right, and that show a ring. Others: share of fully
right images of the held-out captions of all shapes.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.data.shapes.drawing import BACKGROUND
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.training.mesh import make_mesh

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from shapes_subject import subject_text, subjects

SIZE, SEEN = 32, 20


def is_ring(image):
    """Whether an image uint8 [S, S, 3] shows one round outline with a hole of 10 to 55 % of its area."""
    marked = np.linalg.norm(image / 255 - BACKGROUND, axis=-1) > 0.25
    filled = ndimage.binary_fill_holes(marked)
    labels, count = ndimage.label(filled)
    if not count:
        return False
    largest = labels == 1 + np.argmax(ndimage.sum(filled, labels, range(1, count + 1)))
    area = largest.sum()
    rows, columns = np.nonzero(largest)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    round_enough = 0.8 < height / width < 1.25 and abs(area / (np.pi / 4 * height * width) - 1) < 0.15
    return bool(round_enough and 0.10 < (largest & ~marked).sum() / area < 0.55)


def shares(model, arguments):
    """{column: share} of one model."""
    pipeline = open_pipeline(model)
    params = jax.tree.map(jnp.asarray, pipeline.load_params())
    name = pipeline.generation.sampler if pipeline.family == "sd3" else "ddim"
    sampler = ImageSampler(
        pipeline, pipeline.make_sampler(name, 20, 0.0, SIZE, SIZE), make_mesh(1, 1), 64, height=SIZE, width=SIZE,
        guidance_scale=arguments.guidance,
    )  # fmt: skip

    def images_of(prompts):
        prompts = [prompt for prompt in prompts for _ in range(arguments.images)]
        return prompts, to_uint8(sampler(params, prompts, keys=jax.random.split(jax.random.key(1), len(prompts))))

    captions = subjects(0)
    found = {}
    for label, some in (("rings, drawn", captions[:SEEN]), ("rings, left out", captions[SEEN:])):
        found[label] = np.mean([is_ring(image) for image in images_of([subject_text(one) for one in some])[1]])
    prompts, images = images_of([caption.text for caption in captions])
    found["circles right"] = np.mean([fully_right(*pair) for pair in zip(prompts, images)])
    found["circles that are rings"] = np.mean([is_ring(image) for image in images])
    prompts, images = images_of(list(load_prompts("shapes:held_out"))[:64])
    found["others right"] = np.mean([fully_right(*pair) for pair in zip(prompts, images)])
    return found


def main():
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=4, help="per prompt")
    parser.add_argument("--guidance", type=float, default=3.0)
    arguments = parser.parse_args()
    for number, model in enumerate(arguments.models):
        found = shares(model, arguments)
        if not number:
            print("| model | " + " | ".join(found) + " |\n" + "|" + " --- |" * (len(found) + 1))
        print(f"| {model} | " + " | ".join(f"{value:.2f}" for value in found.values()) + " |")


if __name__ == "__main__":
    main()
