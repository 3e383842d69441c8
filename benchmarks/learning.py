"""Trains recipes of the shapes world with several seeds and draws what each learns from how many images.

    python benchmarks/learning.py --work runs/learning [--recipes refl_tiny draft_tiny ddpo_tiny] [--seeds 0 1 2]
    python benchmarks/learning.py --work runs/learning --jobs 0          # the page again, from the runs that are there
    python benchmarks/learning.py --work runs/groups --recipes grpo_tiny dpo_tiny,model.path=tiny-shapes-sd3 \\
        --page docs/groups.md --plot docs/images/groups.png

A recipe may be followed by fields of its own. Runs that are complete in WORK are kept and others continued. Every run
is evaluated on the same held-out prompts with the guidance of use. Draws reward, checker and diversity against images
sampled and denoiser calls, and writes the tables of a page (mean and range over seeds) between its two marks.

A denoiser call is one image through the network once, twice with guidance; gradients count as the call that they
differentiate. Figures of the recipes' own evaluation settings: `--set eval.guidance_scale=None`.
"""

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
from pathlib import Path

from imagereward_jax.methods.base import find_method

ROOT = Path(__file__).parents[1]
RECIPES = ("refl_tiny", "draft_tiny", "draft_lv_tiny", "alignprop_tiny", "drtune_tiny", "ddpo_tiny")
MARKS = "<!-- benchmarks/learning.py writes from here -->", "<!-- to here -->"
METRICS = {"eval/reward_mean": "reward", "eval/checker_rate": "checker", "eval/diversity": "diversity"}


def calls_per_image(method):
    """Denoiser calls that a training image costs, from `config.method` as the workdir's config.json has it."""
    name, calls = method["name"], method.get("num_steps", 0)
    if name == "refl":
        calls = (method["stop_min"] + method["stop_max"]) / 2 + 1
    elif name in ("ddpo", "flow_grpo"):
        settings = find_method(name).Config(**{key: value for key, value in method.items() if key != "name"})
        calls += method["epochs"] * settings.trained_steps * (2 if method.get("penalty_weight") else 1)
    elif name == "nft":  # the new policy and the old one
        calls += method["epochs"] * method["noise_levels"] * (2 + bool(method["base_penalty"]))
    elif name == "awm":
        calls += method["noise_levels"] * (1 + bool(method["base_penalty"]) + bool(method["average_penalty"]))
    elif name == "dpo":  # of a given image: the model and the reference
        calls = 2
    elif name == "dpo_online":  # the best and the worst of a group
        calls += 2 * 2 / method["group_size"]
    elif method.get("stop_min") is not None:
        calls = (method["stop_min"] + method["num_steps"] - 1) / 2 + 1
    calls += method.get("noisings") or 0
    return calls * (2 if max(method.get("guidance_scale", 1), method.get("guidance_max") or 0) > 1 else 1)


def images_per_step(config):
    """Images that a training step samples; of offline DPO, that it is given."""
    method = config["method"]
    if method["name"] == "dpo":
        return 2 * config["batch_size"]
    return (
        method["rounds"] * (method["round_size"] or config["batch_size"])
        if "rounds" in method
        else config["batch_size"]
    )


def split(run):
    """A run's recipe and the assignments after it, of "grpo_tiny,model.path=tiny-shapes-sd3"."""
    recipe, *assignments = run.split(",")
    return recipe, assignments


def folder_of(run):
    """The folder name of a run."""
    return "-".join(part.rpartition("=")[2].replace("/", "_") for part in run.split(","))


def train(run, seed, arguments):
    """Trains a recipe with a seed, unless that is done. Returns its workdir; raises if the run fails."""
    recipe, assignments = split(run)
    workdir = Path(arguments.work) / f"{folder_of(run)}-{seed}"
    command = [sys.executable, "-m", "imagereward_jax.train", f"--config={ROOT / 'configs' / recipe}.py"]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", "--config.writers=('jsonl',)"]
    command += [f"--config.{assignment}" for assignment in (*arguments.set, *assignments)]
    log = workdir.parent / f"{workdir.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: {run} with seed {seed} ended with {done.returncode}; see {log}")
    return workdir


def curves(workdir):
    """[{"images", "calls", metric...}] of every evaluation of a run."""
    config = json.loads((workdir / "config.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        if "eval/reward_mean" in row:
            images = row["step"] * images_per_step(config)
            found.append({"images": images, "calls": images * calls_per_image(config["method"])})
            found[-1] |= {name: row[metric] for metric, name in METRICS.items() if row.get(metric) is not None}
    return found


def spread(values):
    """ "mean (least to most)" of numbers; one number if all are equal."""
    mean = sum(values) / len(values)
    return f"{mean:.3g}" if min(values) == max(values) else f"{mean:.3g} ({min(values):.3g} to {max(values):.3g})"


def table(runs):
    """The Markdown table of {recipe: [evaluations]}."""
    measured = [f"{name} {when}" for name in METRICS.values() for when in ("before", "after")]
    head = ["recipe", "seeds", "images", "denoiser calls", *measured]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for recipe, seeds in runs.items():
        first, last = ([evaluations[index] for evaluations in seeds] for index in (0, -1))
        cells = [recipe, str(len(seeds)), f"{last[0]['images']:,}", f"{last[0]['calls']:,.0f}"]
        for name in METRICS.values():
            cells += [spread([one[name] for one in rows]) if name in rows[0] else "" for rows in (first, last)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def images_to_reach(evaluations, level):
    """Images until the reward first is `level`, between two evaluations by a straight line; None if it never is."""
    before = evaluations[0]
    for one in evaluations:
        if one["reward"] >= level:
            rise = one["reward"] - before["reward"]
            share = (level - before["reward"]) / rise if rise else 0.0
            return before["images"] + share * (one["images"] - before["images"])
        before = one
    return None


def mean_curve(seeds):
    """[{"images", "reward"}] of every evaluation, mean over seeds."""
    return [
        {"images": rows[0]["images"], "reward": statistics.mean(row["reward"] for row in rows)} for rows in zip(*seeds)
    ]


def table_of_images(runs, baseline):
    """The Markdown table of images until each recipe, mean of its seeds, has half of what `baseline` gains, and all."""
    means = {name: mean_curve(seeds) for name, seeds in runs.items()}
    start, best = means[baseline][0]["reward"], max(one["reward"] for one in means[baseline])
    levels = [start + (best - start) / 2, best]
    theirs = [images_to_reach(means[baseline], level) for level in levels]
    head = ["recipe"]
    for level in levels:
        head += [f"images to reward {level:.3f}", f"fewer than {baseline}"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, evaluations in means.items():
        cells = [name]
        for level, measure in zip(levels, theirs):
            count = images_to_reach(evaluations, level)
            cells.append("not" if count is None else f"{count:,.0f}")
            cells.append("" if count is None or name == baseline else f"{measure / count:.1f} times")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(path, text):
    """Replaces what is between the two marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def looks(run):
    """(method, line style) of a run in the plot: dashed on the tiny Stable Diffusion 3.5."""
    recipe = split(run)[0]
    return recipe.removesuffix("_tiny").removesuffix("_sd3"), "--" if "sd3" in run else "-"


def draw(runs, path):
    """Reward, checker and diversity against images (above) and denoiser calls (below), a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, methods = list(METRICS.values()), list(dict.fromkeys(looks(run)[0] for run in runs))
    figure, axes = pyplot.subplots(2, len(names), figsize=(4 * len(names), 6), sharex="row", constrained_layout=True)
    for row, (across, label) in enumerate((("images", "images"), ("calls", "denoiser calls"))):
        ends = [seed[-1][across] for seeds in runs.values() for seed in seeds]
        for column, name in enumerate(names):
            axis = axes[row, column]
            for run, seeds in runs.items():
                method, line = looks(run)
                for number, evaluations in enumerate(seeds):
                    points = [(one[across], one[name]) for one in evaluations if name in one]
                    label_of = method + (" (SD 3.5)" if line == "--" else "") if number == 0 else None
                    color = f"C{methods.index(method)}"
                    axis.plot(*zip(*points), line, color=color, marker=".", linewidth=1, label=label_of)
            if max(ends) > 5 * min(ends):
                axis.set_xscale("symlog", linthresh=min(ends) / 2)
            axis.set_xlabel(label)
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=110)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 0: train nothing")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[
            "eval.guidance_scale=3.0",
            "eval.guidance_scales=()",
            "eval.num_steps=20",
            "eval.eta=0.0",
            "eval.every=20",
        ],
        metavar="FIELD=VALUE",
        help="of every run's config, unless the recipe is followed by it",
    )
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "learning.png")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "methods.md", help="page to write the tables into")
    parser.add_argument("--baseline", default="ddpo_tiny", help="whose images are the measure")
    return parser.parse_args(argv)


def main():
    """See the module's docstring."""
    arguments = parse_args()
    jobs = [(recipe, seed) for seed in arguments.seeds for recipe in arguments.recipes]
    if arguments.jobs:
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda job: train(*job, arguments), jobs))
    runs = {}
    for recipe in arguments.recipes:
        folders = [Path(arguments.work) / f"{folder_of(recipe)}-{seed}" for seed in arguments.seeds]
        if done := [curves(folder) for folder in folders if (folder / "done.json").exists()]:
            runs[recipe] = done
    if not runs:
        raise SystemExit(f"error: {arguments.work} holds no complete run")
    draw(runs, arguments.plot)
    tables = [table(runs)]
    if arguments.baseline in runs:
        tables.append(table_of_images(runs, arguments.baseline))
    text = "\n\n".join(tables)
    write_page(arguments.page, text)
    print(text)


if __name__ == "__main__":
    main()
