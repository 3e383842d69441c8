"""Puts several runs into one page: `imagereward compare RUN RUN ... -o PAGE`.

    imagereward compare runs/refl_tiny runs/draft_tiny -o compared.html

RUN is the workdir of a run of `train`, also of one that goes on. The page opens without a network. It shows the reward
and what watches it with a line for each run, first, best and last figures with what they cost, the images of the same
prompts side by side, and the fields of the configs that differ.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, program, say

if TYPE_CHECKING:
    from imagereward_jax.training.record import Run

GENERATOR = "imagereward_jax.compare"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("compare"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="workdir of a run of `train`")
    parser.add_argument("-o", "--out", type=Path, metavar="PAGE", required=True, help="page to write, an .html")
    parser.add_argument("--overwrite", action="store_true", help="replace a file at PAGE that is no such page")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parses, reads, writes; returns the exit status."""
    args = parse_args(argv)
    from imagereward_jax.pages.page import check_replaceable

    check_replaceable(args.out, "--out", GENERATOR, overwrite=args.overwrite)
    runs = read_runs(args.runs)
    write_comparison(args.out, runs)
    say(f"wrote {args.out}: {', '.join(name for name, _ in runs)}")
    return 0


def read_runs(workdirs: Sequence[Path]) -> list[tuple[str, "Run"]]:
    """Reads runs, each under a name of its own: the folder's, or its path if others are called so.

    Raises:
        FileNotFoundError: a workdir is not there, or is none. ValueError: a workdir was given twice, has no evaluation,
            or its config.json cannot be read.
    """
    from imagereward_jax.config import did_you_mean
    from imagereward_jax.training.metric_writers import METRICS
    from imagereward_jax.training.record import read_run

    if len({path.resolve() for path in workdirs}) < len(workdirs):
        raise ValueError("RUN: the same workdir was given twice")
    for path in workdirs:
        if not path.is_dir():
            beside = [str(other) for other in path.parent.glob("*/")] if path.parent.is_dir() else []
            raise FileNotFoundError(f"RUN {path}: no such folder{did_you_mean(path, beside)}")
    runs = [read_run(path) for path in workdirs]
    for run in runs:
        if not run.evaluations:
            raise ValueError(
                f"RUN {run.workdir}: no evaluation in {METRICS}, which a run has after its first one, with 'jsonl' in "
                "config.writers"
            )
    names = [run.name for run in runs]
    return [(name if names.count(name) == 1 else str(run.workdir), run) for name, run in zip(names, runs)]


def write_comparison(path: Path, runs: Sequence[tuple[str, "Run"]]) -> None:
    """Writes the page.

    Args:
        runs: (name, run) of runs that have evaluations.
    """
    from imagereward_jax.pages import figures
    from imagereward_jax.pages.page import escape, paragraph, write_page

    title = " and ".join(name for name, _ in runs) if len(runs) < 3 else f"{len(runs)} runs"
    head = [f"<h1>{escape(title)}</h1>"] if len(runs) < 3 else [f"<h1>{escape(title)} compared</h1>"]
    rewards = {_reward_of(run) for _, run in runs}
    if len(rewards) > 1:
        told = "These runs follow different rewards, whose values cannot be compared; the judges and the checker can."
        head.append(paragraph(told, "ending"))
    parts = [_curves(runs), _figures_and_costs(runs), _images(runs), _differences(runs)]
    write_page(path, title, [*head, figures.keys([name for name, _ in runs]), *parts], generator=GENERATOR)


def _reward_of(run):
    reward = run.config.get("reward", {})
    return str(
        (reward.get("path"), sorted((term["path"], term["weight"]) for term in reward.get("terms", {}).values()))
    )


def _watched(runs):
    """The metrics that matter first, of all runs, in one order."""
    names = [name for _, run in runs for name in run.watched()]
    judges = sorted(name for name in set(names) if name.startswith("eval/judge_"))
    order = [*dict.fromkeys(name for name in names if name not in judges)]
    return order[:1] + judges + order[1:]


def _curves(runs):
    from imagereward_jax.pages import figures
    from imagereward_jax.training.html_report import called

    steps = [row["step"] for _, run in runs for row in run.evaluations]
    panels = []
    for name in _watched(runs):
        lines = [
            figures.Line(run.points(name), label, colour)
            for colour, (label, run) in enumerate(runs)
            if run.points(name)
        ]
        panels.append(figures.panel(*called(name), lines, (min(steps), max(steps))))
    return (
        f'<h2>Over the training steps</h2><figure class="watch">{"".join(panels)}<figcaption>The horizontal '
        "axis is the training step. Beside each name: the last values.</figcaption></figure>"
    )


def _figures_and_costs(runs):
    """A table with a column for each run."""
    from imagereward_jax.pages.page import escape, table
    from imagereward_jax.pages.words import words
    from imagereward_jax.training.html_report import costs, named
    from imagereward_jax.training.metric_writers import rounded
    from imagereward_jax.training.record import REWARD

    rows = []
    for name in _watched(runs):
        title, cells = escape(words(name).title), []
        for _, run in runs:
            known = [value for _, value in run.points(name) if value is not None]
            cells.append(f"{rounded(known[0])} → <b>{rounded(known[-1])}</b>" if known else "none")
        rows.append([named(name), *cells])
        if name.startswith("eval/judge_") or name == REWARD:
            rows.append([f"{title}, best", *(_best(run, name) for _, run in runs)])
    rows.append(["steps", *map(_steps, (run for _, run in runs))])
    spent = [dict(costs(run)) for _, run in runs]
    for name in dict.fromkeys(name for one in spent for name in one):
        rows.append([name, *(one.get(name, "not recorded") for one in spent)])
    return "<h2>Figures and cost</h2>" + table(["first → last", *(escape(name) for name, _ in runs)], rows)


def _steps(run):
    stopped = ", stopped by its watch" if "stopped" in (run.done or {}) else ""
    return f"{run.step} of {run.config['steps']}{stopped}"


def _best(run, name):
    known = [(value, step) for step, value in run.points(name) if value is not None]
    return "none" if not known else "{:.4g} at step {}".format(*max(known, key=lambda pair: (pair[0], -pair[1])))


def _images(runs):
    """The same prompts: before training, and at the last evaluation of each run."""
    from imagereward_jax.pages.page import escape, paragraph
    from imagereward_jax.pages.words import words
    from imagereward_jax.training import prompt_cards as shown
    from imagereward_jax.training.record import REWARD

    sampled = [(name, run) for name, run in runs if run.samples]
    if not sampled:
        return ""
    befores, lasts = _befores(sampled), []
    for name, run in sampled:
        step, last = list(run.samples.items())[-1]
        lasts.append((f"{name}, step {step}", last))
    keys = [key for key in befores[0][1] if all(key in there for _, there in (*befores, *lasts))]
    if not keys:
        return "<h2>Images</h2>" + paragraph("The runs have no held-out prompt in common.", "soft")
    names = list(befores[0][1][keys[0]].scores)
    if len({_reward_of(run) for _, run in sampled}) > 1:
        names = [name for name in names if name != REWARD]
    metric = shown.ordering_metric(names)

    def apart(key):
        means = [there[key].mean(metric) for _, there in (lasts if len(lasts) > 1 else [*befores, *lasts])]
        known = [mean for mean in means if mean is not None]
        return max(known) - min(known) if known else None

    def sides(key):
        found = []
        for name, there in (*befores, *lasts):
            scored = f": {shown.number(there[key].mean(metric))}" if metric else ""
            found.append(shown.Side(f"{escape(name)}{scored}", there[key].images))
        return found

    titles = ("Where the runs differ most", "Where they differ least")
    lacking = [name for name, run in runs if not run.samples]
    note = "Held-out prompts that all runs share, at the first evaluation and at the last one of each run"
    note += f", with their {words(metric).title.lower()}." if metric else "."
    note += f" Without images: {', '.join(lacking)}." if lacking else ""
    cards = shown.cards(shown.ends_first(keys, apart), apart, sides, lambda key: "", titles)
    return f"<h2>Same prompts, side by side</h2>{paragraph(escape(note), 'soft')}{cards}"


def _befores(sampled):
    """[(caption, samples)] of first evaluations; only one if the runs began with the same scores."""
    found = []
    for name, run in sampled:
        first = next(iter(run.samples.values()))
        if not any(_began_alike(first, there) for _, there in found):
            found.append((f"before, {name}", first))
    return [("before", found[0][1])] if len(found) == 1 else found


def _began_alike(one, other):
    """Whether the scores of two evaluations are the same within rounding."""
    if one.keys() != other.keys():
        return False
    pairs = [(one[key].mean(name), other[key].mean(name)) for key in one for name in one[key].scores]
    return all(a == b or (None not in (a, b) and math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)) for a, b in pairs)


def _differences(runs):
    """The fields of the configs that are not the same in all runs."""
    from imagereward_jax.config import flat_fields
    from imagereward_jax.pages.page import escape, folded, paragraph, table

    if len(runs) < 2:
        return ""
    fields = [dict(flat_fields(run.config)) for _, run in runs]
    shared, partly = [], []
    for name in dict.fromkeys(name for one in fields for name in one):
        values = [repr(one[name]) if name in one else "no such field" for one in fields]
        if len(set(values)) > 1:
            there = shared if all(name in one for one in fields) else partly
            there.append([f"<code>{escape(name)}</code>", *map(escape, values)])
    names = [escape(name) for name, _ in runs]
    text = "<h2>Fields of the configs that differ</h2>"
    text += table(["field", *names], shared) if shared else paragraph("None of those that all runs have.")
    if partly:
        text += folded(f"{len(partly)} fields that not all of the runs have", table(["field of some", *names], partly))
    return text


if __name__ == "__main__":
    sys.exit(main())
