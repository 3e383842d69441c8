"""Scores images for a prompt: `imagereward score --prompt "a cat" 1.png 2.png`.

Scores many rows of (prompt, image) from a file or folder into another file:

    imagereward score --input rows.csv --output scored.csv

The same command again resumes a run that was interrupted, even by kill -9, or says that it is complete.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagereward_jax.command import command
from imagereward_jax.compilation_cache import add_flag, use_compilation_cache
from imagereward_jax.terminal import Parser, escape, program, say

if TYPE_CHECKING:
    from imagereward_jax.bulk_scoring.score_table import Outcome


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from imagereward_jax.bulk_scoring.flags import add_scorer_flags

    parser = Parser(
        prog=program("score"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--prompt", help="text that the images were made for")
    parser.add_argument(
        "--model",
        default="ImageReward-v1.0",
        help="ImageReward-v1.0, tiny-shapes, tiny-shapes-v2, CLIP, BLIP, Aesthetic, Aesthetic-AlignProp, "
        "Aesthetic-AlignProp-TRL, PickScore, HPSv2.1, jpeg-compressibility, jpeg-incompressibility, module:function, "
        "jax:module:function, random, an ImageReward.pt, or a folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in the order of the arguments")
    add_scorer_flags(parser)
    add_flag(parser)
    many = parser.add_argument_group("many rows")
    many.add_argument("--input", help=".csv, .tsv, .json, .jsonl, .parquet, or a folder of images with captions")
    many.add_argument(
        "--output", type=Path, help="file for the rows with a score column: .csv, .tsv, .json, .jsonl, .parquet"
    )
    many.add_argument("--prompt-column", help="default: text, prompt or caption")
    many.add_argument("--image-column", help="default: image, image_path, file_name, path or file")
    many.add_argument("--score-column", default="score", help="name of the new column")
    many.add_argument(
        "--on-error",
        default="stop",
        choices=("stop", "skip"),
        help="skip: leave the score empty and say why in a column error",
    )
    many.add_argument("--overwrite", action="store_true", help="replace an existing output")
    many.add_argument("--workers", type=int, help="threads that read images; default: one per core")
    many.add_argument(
        "--distributed", action="store_true", help="share the rows with the other processes of a TPU pod or Slurm job"
    )
    many.add_argument("--coordinator", metavar="HOST:PORT", help="with --distributed elsewhere: address of process 0")
    many.add_argument("--num-processes", type=int, help="with --coordinator: number of processes")
    many.add_argument("--process-id", type=int, help="with --coordinator: number of this process, from 0")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser, args):
    if args.input is None:
        if args.output is not None:
            parser.error("--output needs --input, the rows to score")
        if not args.images or args.prompt is None:
            parser.error("give --prompt and images, or --input and --output")
    else:
        if args.images:
            parser.error(f"images are named by --input {args.input}; {args.images[0]} is one too many")
        if args.output is None:
            parser.error("--input needs --output, the file to write")
        if args.json:
            parser.error("--json is for images on the command line; name an --output that ends in .json")
    if not args.distributed and any(x is not None for x in (args.coordinator, args.num_processes, args.process_id)):
        parser.error("--coordinator, --num-processes and --process-id need --distributed")


def _check_values(args):
    for name, most in (("workers", 1024), ("batch_size", 65_536)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value} should be from 1 to {most:,}")
    if args.prompt is not None and any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise ValueError(f"--prompt {args.prompt!r} is not text in UTF-8: it holds half a character")


def score_files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Loads the model and scores; returns one dict per image (image, score, rank), in the order given."""
    from imagereward_jax.bulk_scoring.flags import scorer_options
    from imagereward_jax.bulk_scoring.scorers import open_scorer
    from imagereward_jax.bulk_scoring.stream import check_score
    from imagereward_jax.rewards.preprocess import as_image_list

    as_image_list(args.images)  # a missing file is named before the model is loaded
    model = open_scorer(args.model, **scorer_options(args))
    ranks, rewards = model.inference_rank(args.prompt, args.images)
    for image, score in zip(args.images, rewards):
        check_score(image, score)
    return [{"image": image, "score": score, "rank": rank} for image, score, rank in zip(args.images, rewards, ranks)]


def score_many(args: argparse.Namespace) -> "Outcome":
    """Scores the rows of --input into --output; see `bulk_scoring.score_table`."""
    from imagereward_jax.bulk_scoring.flags import scorer_options
    from imagereward_jax.bulk_scoring.score_table import score_table
    from imagereward_jax.bulk_scoring.scorers import open_scorer

    return score_table(
        args.input,
        args.output,
        lambda: open_scorer(args.model, **scorer_options(args)),
        settings={"model": args.model, "dtype": args.dtype, "image_rule": args.image_rule},
        batch_size=args.batch_size,
        workers=args.workers,
        skip_errors=args.on_error == "skip",
        overwrite=args.overwrite,
        score_column=args.score_column,
        process=_process(args),
        prompt=args.prompt,
        prompt_column=args.prompt_column,
        image_column=args.image_column,
    )


def _process(args):
    """Joins the other processes; returns (number of this process, count of processes)."""
    if not args.distributed:
        return 0, 1
    import jax

    from imagereward_jax.distributed import join

    join(args.coordinator, args.num_processes, args.process_id)
    return jax.process_index(), jax.process_count()


def as_table(rows: list[dict[str, Any]]) -> str:
    """Formats rows as text, best first."""
    lines = [f"{'rank':>4}  {'score':>8}  image"]
    for row in sorted(rows, key=lambda row: row["rank"]):
        lines.append(f"{row['rank']:>4}  {row['score']:>8.4f}  {escape(row['image'])}")
    return "\n".join(lines)


def _report(args, outcome):
    """Prints to stderr how many rows were scored, and the errors."""
    if outcome.complete:
        say(f"{args.output} is complete: {outcome.rows} rows, scored by an earlier run", file=sys.stderr)
    else:
        earlier = f", {outcome.resumed} of them by an earlier run" if outcome.resumed else ""
        say(f"{args.output}: {outcome.rows} rows{earlier}", file=sys.stderr)
    if outcome.errors:
        say(f"{len(outcome.errors)} images could not be scored:", file=sys.stderr)
        for text in list(outcome.errors.values())[:10]:
            say(f"  {text}", file=sys.stderr)
        if len(outcome.errors) > 10:
            say(f"  and {len(outcome.errors) - 10} more, in the column error", file=sys.stderr)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    _check_values(args)
    use_compilation_cache(args.compilation_cache)
    if args.input is not None:
        try:
            _report(args, score_many(args))
        except KeyboardInterrupt as stop:
            stop.args = ("the same command continues from here",)
            raise
        return 0
    rows = score_files(args)
    if args.json:
        say(json.dumps({"model": args.model, "prompt": args.prompt, "images": rows}, indent=2, ensure_ascii=False))
    else:
        say(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
