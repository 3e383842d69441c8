"""Agreement of scorers with people: `imagereward evaluate --model ImageReward-v1.0 --data test.json`.

From rankings (test.json of ImageReward or of HPDv2, Pick-a-Pic, ImageRewardDB: docs/files.md; or shapes:held_out) it
measures preference accuracy, recall@k and filter@k. From prompts alone and the images of several generators (--images
DIR with DIR/GENERATOR/ID_K.png) it measures each generator's mean score and Spearman's rho to the human order.
Intervals are bootstraps over prompts.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagereward_jax.command import command
from imagereward_jax.compilation_cache import add_flag, use_compilation_cache
from imagereward_jax.terminal import Parser, escape, program, say


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from imagereward_jax.bulk_scoring.flags import add_scorer_flags

    parser = Parser(prog=program("evaluate"), description=__doc__)
    parser.add_argument(
        "--model", action="append", required=True, help="any model that `score` takes; may be given several times"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="rankings, prompts, or shapes:held_out")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images; default: beside the file")
    parser.add_argument(
        "--prompt-column", metavar="NAME", help="column of prompts alone; default: text, prompt, caption or prompts"
    )
    parser.add_argument("--human-order", metavar="A,B,C", help="generators as people rank them, best first")
    parser.add_argument("--limit", type=int, help="number of prompts to read; default: all")
    parser.add_argument(
        "--no-spoilt",
        dest="spoilt",
        action="store_false",
        help="for shapes: draw images that differ in their words alone",
    )
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4], help="values of k for recall@k and filter@k")
    parser.add_argument("--json", action="store_true", help="print JSON, with the score of every image")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the prompts judged worst")
    parser.add_argument("--overwrite", action="store_true", help="replace a file at --html that is no such page")
    parser.add_argument("--show", type=int, default=20, help="number of prompts on that page")
    parser.add_argument("--resamples", type=int, default=1000, help="number of bootstrap resamples")
    parser.add_argument("--level", type=float, default=0.95, help="confidence level of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of the model random")
    parser.add_argument("--workers", type=int, help="threads that read images; default: one per core")
    add_scorer_flags(parser)
    add_flag(parser)
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Scores the images and measures agreement.

    Returns:
        {"report": for JSON, "tables": [(header, rows)], "notes": lines, "groups", "scores": for the page}.

    Raises:
        ValueError, OSError: naming the bad input; files are checked before a model is loaded.
    """
    _check_numbers(args)

    from imagereward_jax.agreement.page import short_names
    from imagereward_jax.agreement.sources import Generations, load_evaluation

    data = load_evaluation(args.data, args.images, args.limit, args.spoilt, args.prompt_column)
    options = {"resamples": args.resamples, "level": args.level, "seed": args.seed}
    names = short_names(args.model)
    if isinstance(data, Generations):
        order = human_order(args.human_order, list(data.images))
        return _table_1(args, data, names, order, options)
    if args.human_order:
        raise ValueError("--human-order is for images of generators; this data has people's rankings in it")
    return _table_3(args, data, names, options)


def _check_numbers(args):
    limits = {"resamples": 1_000_000, "show": 10_000, "batch_size": 65_536, "workers": 1024, "limit": 2**31}
    for name, most in limits.items():
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} should be from 1 to {most:,}")
    if min(args.k) < 1 or len(set(args.k)) != len(args.k):
        raise ValueError(f"--k {' '.join(map(str, args.k))} should be different numbers of at least 1")
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level} should lie between 0 and 1, as 0.95")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} should be at least 0")
    if len(set(args.model)) != len(args.model):
        raise ValueError("--model was given twice with the same name")
    if args.html:
        from imagereward_jax.agreement.page import GENERATOR
        from imagereward_jax.pages.page import check_replaceable

        check_replaceable(args.html, "--html", GENERATOR, overwrite=args.overwrite)


def human_order(given: str | None, generators: Sequence[str]) -> list[str] | None:
    """Orders the generators from best to worst by people: as given, else as published; None if neither is known.

    Raises:
        ValueError: the given names are not those of the folders.
    """
    from imagereward_jax.agreement.summary import PUBLISHED_ORDER

    if given is None:
        return list(PUBLISHED_ORDER) if set(generators) == set(PUBLISHED_ORDER) else None
    order = [name.strip() for name in given.split(",")]
    if sorted(order) != sorted(generators):
        raise ValueError(f"--human-order {given}: expected each of {', '.join(sorted(generators))} once")
    return order


def _scores(args, data, names, score):
    """Scores with each model, one after the other: {name: result of `score`}."""
    from tqdm import tqdm

    from imagereward_jax.agreement.scoring import count_images
    from imagereward_jax.bulk_scoring.flags import scorer_options
    from imagereward_jax.bulk_scoring.scorers import open_scorer

    results = {}
    for model, name in zip(args.model, names):
        scorer = open_scorer(model, **scorer_options(args), seed=args.seed)
        with tqdm(total=count_images(data), unit="image", desc=escape(name), file=sys.stderr) as bar:
            results[name] = score(scorer, data, workers=args.workers, progress=bar.update)
    return results


def _table_3(args, groups, names, options):
    from imagereward_jax.agreement import text
    from imagereward_jax.agreement.scoring import score_groups
    from imagereward_jax.agreement.summary import agreement

    scores = _scores(args, groups, names, score_groups)
    results = {name: agreement(groups, rows, ks=args.k, **options) for name, rows in scores.items()}
    first = next(iter(results.values()))
    cases = ", ".join(f"{name} {estimate.cases}" for name, estimate in first.items() if name.startswith("recall"))
    notes = [
        f"{len(groups)} prompts, {first['accuracy'].cases} pairs; prompts counted: {cases}",
        f"[{args.level:.0%} interval, {args.resamples} bootstraps over prompts]",
    ]
    models = {name: {metric: value.to_dict() for metric, value in row.items()} for name, row in results.items()}
    prompts = [
        {"id": group.id, "prompt": group.prompt, "ranking": group.ranks, "scores": {n: scores[n][i] for n in scores}}
        for i, group in enumerate(groups)
    ]
    report = {"data": args.data, "models": models, "prompts": prompts}
    return {
        "report": report,
        "tables": [text.agreement_table(results)],
        "notes": notes,
        "groups": groups,
        "scores": scores,
    }


def _table_1(args, data, names, order, options):
    from imagereward_jax.agreement import text
    from imagereward_jax.agreement.scoring import one_image_each, score_generations
    from imagereward_jax.agreement.summary import generator_means

    scores = _scores(args, data, names, score_generations)
    results = {name: generator_means(rows, human_order=order, **options) for name, rows in scores.items()}
    count = len(next(iter(data.images.values()))[0])
    notes = [
        f"{len(data.prompts)} prompts, {count} images each by {len(data.images)} generators",
        f"[{args.level:.0%} interval, {args.resamples} bootstraps over prompts]",
    ]
    if order is None:
        notes.append("no Spearman rho: say how people rank the generators with --human-order A,B,C")
    models = {
        name: {
            "mean_score": {generator: mean.to_dict() for generator, mean in means.items()},
            "spearman": None if rho is None else rho.to_dict(),
        }
        for name, (means, rho) in results.items()
    }
    prompts = [
        {"id": name, "prompt": prompt, "scores": {n: {g: v[i].tolist() for g, v in scores[n].items()} for n in scores}}
        for i, (name, prompt) in enumerate(zip(data.ids, data.prompts))
    ]
    report = {"data": args.data, "human_order": order, "models": models, "prompts": prompts}
    groups, means = one_image_each(data, scores, order) if order else ([], {})
    return {
        "report": report,
        "tables": [text.generator_table(results)],
        "notes": notes,
        "groups": groups,
        "scores": means,
    }


def write_page(args: argparse.Namespace, outcome: dict[str, Any]) -> None:
    """Writes --html; the file appears whole or not at all."""
    from imagereward_jax.agreement.page import write_results
    from imagereward_jax.data.prompts import SHAPES_PREFIX

    title = f"{' and '.join(outcome['report']['models'])} on {os.path.basename(args.data)}"
    judges = "the rules" if args.data.startswith(SHAPES_PREFIX) else "people"
    parts = [outcome[name] for name in ("tables", "notes", "groups", "scores")]
    write_results(args.html, title, *parts, judges=judges, shown=args.show)


def _without_nan(value):
    """Replaces NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@command
def main(argv: Sequence[str] | None = None) -> int:
    from imagereward_jax.agreement.text import table

    args = parse_args(argv)
    use_compilation_cache(args.compilation_cache)
    outcome = evaluate(args)
    if args.html:
        write_page(args, outcome)
    if args.json:
        say(json.dumps(_without_nan(outcome["report"]), indent=2, ensure_ascii=False))
    else:
        say("\n\n".join(table(*part) for part in outcome["tables"]))
        say("\n".join(outcome["notes"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
