"""Scores pictures for a prompt: `python -m imagereward_jax.score --prompt "a cat" 1.png 2.png`."""

import argparse
import json
import sys


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m imagereward_jax.score", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--prompt", required=True, help="the text that the pictures were made for")
    parser.add_argument("--model", default="ImageReward-v1.0", help="a known name, an ImageReward.pt, or a folder")
    parser.add_argument("--json", action="store_true", help="print JSON, in the order of the command line")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokenizer", help="a BERT vocab.txt or its folder, if not the model's own")
    return parser.parse_args(argv)


def score_files(args):
    """Loads the model and scores: one dict a picture (image, score, rank), in the order given."""
    from imagereward_jax.rewards.checkpoint import load
    from imagereward_jax.rewards.images import as_image_list

    as_image_list(args.images)  # a missing file is named before the model is loaded
    model = load(args.model, tokenizer=args.tokenizer, dtype=args.dtype, batch_size=args.batch_size)
    ranks, rewards = model.inference_rank(args.prompt, args.images)
    return [{"image": image, "score": score, "rank": rank} for image, score, rank in zip(args.images, rewards, ranks)]


def as_table(rows):
    """The rows as text, best first."""
    lines = [f"{'rank':>4}  {'score':>8}  image"]
    for row in sorted(rows, key=lambda row: row["rank"]):
        lines.append(f"{row['rank']:>4}  {row['score']:>8.4f}  {row['image']}")
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    try:
        rows = score_files(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"model": args.model, "prompt": args.prompt, "images": rows}, indent=2, ensure_ascii=False))
    else:
        print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
