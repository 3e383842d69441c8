"""Share of fully right images of shapes models over guidance and steps: an untuned model beside tuned ones.

    python benchmarks/guidance_grid.py tiny-shapes runs/refl_tiny/export
    python benchmarks/guidance_grid.py untuned=tiny-shapes,tiny-shapes refl=runs/a/export,runs/b/export \
        --plot docs/images/grid.png

Each argument is a model, or NAME=MODEL,MODEL,... for the mean over models that were tuned with different seeds. All
make the same held-out prompts; the n-th model of a name begins at the n-th noise, so name an untuned model as often.
Prints Markdown: share of images in which the rule-based checker finds all four words; in bold what is at least as good
as the first model.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.training.mesh import make_mesh

SIZE, BATCH = 32, 64


def grid_of(model, number, arguments):
    """[steps, guidance] shares of fully right images of one model, from the noise of a number."""
    pipeline = open_pipeline(model)
    params = jax.tree.map(jnp.asarray, pipeline.load_params())
    prompts = list(load_prompts("shapes:held_out"))[: arguments.prompts]
    prompts = [prompt for prompt in prompts for _ in range(arguments.images)]
    keys = jax.random.split(jax.random.key(number), len(prompts))
    rows = []
    for steps in arguments.steps:
        sampler = ImageSampler(
            pipeline, pipeline.make_sampler(arguments.sampler, steps, 0.0, SIZE, SIZE), make_mesh(1, 1), BATCH,
            height=SIZE, width=SIZE,
        )  # fmt: skip
        row = []
        for scale in arguments.guidance:
            images = to_uint8(sampler(params, prompts, keys=keys, guidance_scale=scale))
            row.append(float(np.mean([fully_right(*pair) for pair in zip(prompts, images)])))
        rows.append(row)
    return np.array(rows)


def table(grids, arguments):
    """Markdown of {name: [seeds, steps, guidance]}."""
    lines = ["| model | steps | " + " | ".join(f"{scale:g}" for scale in arguments.guidance) + " |"]
    lines.append("|" + " --- |" * (len(arguments.guidance) + 2))
    first = next(iter(grids.values())).mean(0)
    for name, seeds in grids.items():
        for index, steps in enumerate(arguments.steps):
            cells = []
            for column, value in enumerate(seeds.mean(0)[index]):
                better = name != next(iter(grids)) and value >= first[index, column]
                cells.append(f"**{value:.2f}**" if better else f"{value:.2f}")
            lines.append(f"| {name if index == 0 else ''} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(grids, arguments):
    """A curve over guidance for each model, an axis for each number of steps; bars from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(arguments.steps), figsize=(4 * len(arguments.steps), 3.4), sharey=True, constrained_layout=True
    )
    for index, (axis, steps) in enumerate(zip(np.atleast_1d(axes), arguments.steps)):
        for number, (name, seeds) in enumerate(grids.items()):
            mean = seeds.mean(0)[index]
            spread = np.maximum([mean - seeds.min(0)[index], seeds.max(0)[index] - mean], 0.0)  # not -1e-17
            style = {"color": "black", "linestyle": "--"} if number == 0 else {"color": f"C{number - 1}"}
            axis.errorbar(arguments.guidance, mean, spread, label=name, linewidth=1.2, capsize=2, **style)
        axis.set_title(f"{steps} steps")
        axis.set_xlabel("guidance")
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("share of fully right images")
    lines, labels = np.atleast_1d(axes)[-1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    figure.savefig(arguments.plot, dpi=110)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="[NAME=]MODEL[,MODEL...]")
    parser.add_argument("--guidance", nargs="+", type=float, default=[1, 1.5, 2, 3, 5, 7.5])
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20, 50])
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--images", type=int, default=2, help="per prompt")
    parser.add_argument("--kept", type=Path, help="JSON file of grids that were measured before, and are not again")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


def main():
    """See the module's docstring."""
    arguments = parse_args()
    kept = json.loads(arguments.kept.read_text()) if arguments.kept and arguments.kept.exists() else {}
    settings = [arguments.guidance, arguments.steps, arguments.sampler, arguments.prompts, arguments.images]
    grids = {}
    for argument in arguments.models:
        name, _, models = argument.rpartition("=")
        models = models.split(",")
        seeds = []
        for number, model in enumerate(models):
            key = json.dumps([model, number, *settings])
            if key not in kept:
                kept[key] = grid_of(model, number, arguments).tolist()
                if arguments.kept:
                    arguments.kept.write_text(json.dumps(kept, indent=1))
            seeds.append(kept[key])
        grids[name or models[0]] = np.array(seeds)
    if arguments.plot:
        draw(grids, arguments)
    print(table(grids, arguments))


if __name__ == "__main__":
    main()
