"""Ranked groups of images that models of the shapes world made, judged by its checker: data for a reward.

    python convert/shapes_groups.py OUT tiny-shapes runs/refl_tiny/export
    python -m imagereward_jax.train --config configs/shapes_reward_samples.py --config.data.groups=OUT/groups.json
    python convert/shapes_groups.py OTHER tiny-shapes --held-out --drawn 0
    imagereward evaluate --model tiny-shapes --model tiny-shapes-v2 --data OTHER/groups.json

A reward that has seen drawings alone misjudges what a generator makes. As ImageReward's data are images of several
models, ranked by people, these are images of several models, or of one before and after tuning, ranked by how many of
the prompt's words the checker finds; groups without a difference are left out. Drawn groups (`--drawn`) keep in mind
what the reward knew before. Every group is written a second time with left and right exchanged, in images and prompt,
if that prompt is of the same split. OUT holds groups.json and PNG files.
"""

import argparse
import json
import sys
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("models", nargs="+", help="diffusers folders or built-in models")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0], help="(default: 1 2 3 5)")
    parser.add_argument("--images", type=int, default=5, help="images of a group, 2 to 9 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps (default: %(default)s)")
    parser.add_argument("--drawn", type=int, default=3000, help="drawn groups beside them (default: %(default)s)")
    parser.add_argument("--prompts", type=int, help="only so many of the prompts")
    parser.add_argument("--held-out", action="store_true", help="of held-out prompts, to judge a reward, not train one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 2 <= args.images <= 9:
        parser.error(f"--images {args.images}: expected 2 to 9")
    if args.steps < 1 or args.drawn < 0 or (args.prompts or 1) < 1:
        parser.error("--steps and --prompts: expected at least 1; --drawn: 0 or more")
    args.split = "shapes:held_out" if args.held_out else "shapes:train"
    return args


def drawn_groups(args, size):
    """(prompt, images uint8 [K, S, S, 3], wrong words or ranks [K]) of drawings."""
    from imagereward_jax.data.prompts import shapes_captions
    from imagereward_jax.data.shapes.drawing import to_uint8
    from imagereward_jax.data.shapes.sources import ShapesGroups

    captions = shapes_captions(args.split)
    source = ShapesGroups(
        args.drawn, args.seed + 1, captions, images_per_prompt=args.images, image_size=size, unclear=0.4
    )
    for index in range(args.drawn):
        group = source[index]
        yield group["prompt"], to_uint8(group["images"]), group["ranking"]


def sampled_groups(args, number, pipeline):
    """The same of images that a model makes, once for every guidance scale."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from imagereward_jax.data.prompts import load_prompts
    from imagereward_jax.data.shapes import words_right
    from imagereward_jax.pipelines.sample import ImageSampler
    from imagereward_jax.storage.contact_sheet import to_uint8
    from imagereward_jax.training.mesh import make_mesh

    params, side = jax.tree.map(jnp.asarray, pipeline.load_params()), pipeline.default_size
    sampler = pipeline.make_sampler("ddim", args.steps, 0.0, side, side)
    chosen = list(load_prompts(args.split))[: args.prompts]
    prompts = [prompt for prompt in chosen for _ in range(args.images)]
    batch = min(64, len(prompts))
    sample = ImageSampler(pipeline, sampler, make_mesh(1, 1, jax.devices()[:1]), batch, height=side, width=side)
    for index, guidance in enumerate(args.guidance):
        key = jax.random.fold_in(jax.random.key(args.seed), number * len(args.guidance) + index)
        pixels = to_uint8(sample(params, prompts, keys=jax.random.split(key, len(prompts)), guidance_scale=guidance))
        wrong = [sum(not right for right in words_right(*pair).values()) for pair in zip(prompts, pixels)]
        yield from zip(chosen, pixels.reshape(-1, args.images, side, side, 3), np.reshape(wrong, (-1, args.images)))


def with_mirrored(groups, prompts):
    """Every group, and once more with left and right exchanged if that prompt is one of `prompts`."""
    for prompt, images, costs in groups:
        yield prompt, images, costs
        words = [{"left": "right", "right": "left"}.get(word, word) for word in prompt.split()]
        if (mirrored := " ".join(words)) in prompts:
            yield mirrored, images[:, :, ::-1], costs


def write(args, folder, pipelines):
    """Writes groups.json and its images; returns the number of groups of each origin."""
    import numpy as np
    from PIL import Image

    from imagereward_jax.data.prompts import load_prompts

    rows, counts, prompts = [], {}, set(load_prompts(args.split))
    origins = {"drawn": drawn_groups(args, pipelines[0].default_size)} if args.drawn else {}
    origins |= {str(name): sampled_groups(args, n, pipelines[n]) for n, name in enumerate(args.models)}
    (folder / "images").mkdir()
    for origin, groups in origins.items():
        for prompt, images, costs in with_mirrored(groups, prompts):
            ranking = np.unique(costs, return_inverse=True)[1] + 1
            if ranking.max() == 1:
                continue
            names = [f"images/{len(rows)}_{number}.png" for number in range(len(images))]
            for name, image in zip(names, images):
                Image.fromarray(image).save(folder / name)
            rows.append({"id": str(len(rows)), "prompt": prompt, "generations": names, "ranking": ranking.tolist()})
            counts[origin] = counts.get(origin, 0) + 1
    (folder / "groups.json").write_text(json.dumps(rows))
    return counts


@command
def main(argv=None):
    args = parse_args(argv)
    from imagereward_jax.pipelines.families import open_pipeline
    from imagereward_jax.storage.folders import new_folder

    pipelines = [open_pipeline(name) for name in args.models]
    with new_folder(args.out, overwrite=False, marker="groups.json") as folder:
        counts = write(args, folder, pipelines)
    for origin, count in counts.items():
        say(f"{count} groups: {origin}")
    say(f"wrote {args.out / 'groups.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
