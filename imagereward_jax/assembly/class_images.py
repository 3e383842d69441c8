"""Images of a class that the untouched model makes before it trains (DreamBooth, arXiv 2208.12242, section 3.2)."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from imagereward_jax.assembly import trainable
from imagereward_jax.config import ConfigError
from imagereward_jax.data.images import list_images
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.storage.files import save_image, write_text
from imagereward_jax.terminal import escape, say
from imagereward_jax.training.mesh import from_all_processes, weight_shardings
from imagereward_jax.training.program import placed

NAME = "class_{:05d}.png"


def make_images(parts: Any, prompts: Sequence[str], count: int, folder: Path, *, captions: bool) -> None:
    """Makes the images that `folder` lacks of `count`, one file at a time; images that are there stay as they are.

    They have the size that is trained on, config.data.image_size, and the model's own sampler, steps and guidance.
    Image k has prompt k modulo their number, and depends on that, config.seed and k alone, so that a run that was
    stopped makes the others.

    Args:
        prompts: of the class. folder: made if absent; any image in it or below counts. captions: write a .txt with its
            prompt beside each image.

    Raises:
        FileExistsError: `folder` is a file. ConfigError: the model gives NaN.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder: choose another config.method.class_images")
    there = [path.name for path in list_images(folder)] if folder.is_dir() else []
    there = set(from_all_processes(there)[0])
    main, missing = jax.process_index() == 0, count - len(there)
    if missing <= 0:
        return
    if main:
        say(f"{escape(folder)}: {len(there)} class images of {count}, making {missing}", file=sys.stderr)
    free = (number for number in itertools.count() if NAME.format(number) not in there)
    numbers, sample = list(itertools.islice(free, missing)), _sampler(parts)
    with tqdm(total=missing, unit="image", desc="class images", disable=not main, file=sys.stderr) as progress:
        for start in range(0, missing, sample.batch_size):
            some = numbers[start : start + sample.batch_size]
            asked = [prompts[number % len(prompts)] for number in some]
            for number, prompt, image in zip(some, asked, sample(asked, some)):
                if not np.isfinite(image).all():
                    raise ConfigError(
                        f"class image {number} has values that are not numbers: the weights of config.model.path may "
                        "be broken, or need --config.dtype=float32"
                    )
                if not main:
                    continue
                path = folder / NAME.format(number)
                if captions:  # first: an image counts as made
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path.with_suffix(".txt"), f"{prompt}\n")
                save_image(path, Image.fromarray(to_uint8(image)), {"prompt": prompt})
            progress.update(len(some))


def _sampler(parts):
    """(prompts, numbers of images) -> images, by the model that training starts from."""
    pipeline, mesh, config = parts.base_pipeline, parts.mesh, parts.config
    generation, size = pipeline.generation, (config.data.image_size, config.data.image_size)
    steps = generation.num_inference_steps
    make = ImageSampler(
        pipeline,
        pipeline.make_sampler(generation.sampler, steps, 0.0, *size),
        mesh,
        config.eval.batch_size,
        height=size[0],
        width=size[1],
        guidance_scale=generation.guidance_scale,
    )
    shapes = trainable.held(parts, pipeline.abstract_params(), trained={})
    params, key = parts.load(placed(shapes, weight_shardings(mesh, shapes))), jax.random.key(config.seed)

    def sample(prompts, numbers):
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(np.asarray(numbers))
        return make(params, prompts, keys=keys)

    sample.batch_size = make.batch_size
    return sample
