"""Times the scoring of rows (prompt, image): ours against the original ImageReward (PyPI image-reward 1.5), full size.

    python benchmarks/score.py --original-python PYTHON --vocab FOLDER [--rows 40] [--images-per-prompt 10]

PYTHON is that of an environment with the original (see tests/reference/imagereward_reference.py); FOLDER is called
bert-base-uncased and holds its vocab.txt. Both sides read the same random weights and the same images (512 px PNG)
from disk. Each side runs in a process of its own, one after the other, `--rounds` times in turn. Each scores one batch
or row before its time is taken, so that compiling does not count. Two times are taken:

- rows: the original scores row by row, `score(prompt, image)`, as its users loop over a file; ours scores as
  `imagereward_jax.score --input` does: threads decode, the device computes batches;
- groups: both rank all images of a prompt in one call, `inference_rank(prompt, images)`.

Prints JSON: images/s of each, their ratios (ours / the original's), the largest difference of their scores, which shows
that both did the same work, and the devices and versions. Needs some 12 GiB of memory and 4 GiB of disk.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
WORDS = (
    "a painting of",
    "a photo of",
    "an ocean",
    "a red cat",
    "clouds and birds",
    "day time",
    "low depth field effect",
)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--original-python",
        default=os.environ.get("IMAGEREWARD_PYTHON"),
        help="Python of the environment with the original",
    )
    parser.add_argument("--vocab", type=Path, required=True, help="folder bert-base-uncased")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--images-per-prompt", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time, of ours")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of ours")
    parser.add_argument("--work", type=Path, help="folder to keep weights and images in for another run")
    parser.add_argument("--side", choices=("prepare", "original", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def rows_of(args):
    """Rows [(prompt, image file)]: one prompt for every `images_per_prompt` images."""
    prompts = [f"{WORDS[i % 2]} {', '.join(WORDS[2 + i % 3 :])}, number {i}" for i in range(args.rows)]
    return [(prompts[i // args.images_per_prompt], args.work / f"{i}.png") for i in range(args.rows)]


def groups_of(rows):
    """Groups rows by prompt: {prompt: images}."""
    groups = {}
    for prompt, path in rows:
        groups.setdefault(prompt, []).append(str(path))
    return groups


def prepare(args):
    """Writes weights and images, in the original's environment."""
    sys.path.insert(0, str(REFERENCE))
    import imagereward_reference as reference
    import numpy as np
    import torch
    from PIL import Image

    (args.work / "med_config.json").write_text(json.dumps(reference.MED_CONFIG))
    os.chdir(args.vocab.parent)  # the original asks for "bert-base-uncased", which may be a folder here
    model = reference.original_class()(med_config=str(args.work / "med_config.json"))
    torch.save(reference.random_weights(model), args.work / "ImageReward.pt")
    rng = np.random.default_rng(1)
    for _, path in rows_of(args):
        Image.fromarray(reference.smooth(rng, 512, 512, 3)).save(path)


def original(args):
    """Times the original."""
    sys.path.insert(0, str(REFERENCE))
    import imagereward_reference as reference
    import torch

    os.chdir(args.vocab.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = reference.original_class()(med_config=str(args.work / "med_config.json"), device=device).to(device)
    model.load_state_dict(torch.load(args.work / "ImageReward.pt", weights_only=True))
    model.eval()
    rows = rows_of(args)
    with torch.no_grad():
        model.score(rows[0][0], str(rows[0][1]))
        start = time.perf_counter()
        scores = [model.score(prompt, str(path)) for prompt, path in rows]
        by_row = time.perf_counter() - start
        start = time.perf_counter()
        for prompt, paths in groups_of(rows).items():
            model.inference_rank(prompt, paths)
        by_group = time.perf_counter() - start
    return {"rows_s": by_row, "groups_s": by_group, "scores": scores, "device": device, "torch": torch.__version__}


def ours(args):
    """Times this library."""
    import jax

    import imagereward_jax
    from imagereward_jax.bulk_scoring.stream import Item, score_items

    options = {"tokenizer": args.vocab, "dtype": args.dtype, "batch_size": args.batch_size}
    model = imagereward_jax.load(args.work / "ImageReward.pt", **options)
    rows = rows_of(args)
    items = [Item(prompt, path, f"row {i + 1}") for i, (prompt, path) in enumerate(rows)]
    score_items(model, items[: args.batch_size])
    if args.rows % args.batch_size:
        score_items(model, items[: args.rows % args.batch_size])  # the last batch may be a smaller program
    start = time.perf_counter()
    scores = score_items(model, items)
    by_row = time.perf_counter() - start
    groups = groups_of(rows)
    for count in {len(paths) for paths in groups.values()}:
        model.inference_rank(rows[0][0], [str(path) for _, path in rows[:count]])
    start = time.perf_counter()
    for prompt, paths in groups.items():
        model.inference_rank(prompt, paths)
    by_group = time.perf_counter() - start
    device = str(jax.devices()[0].device_kind)
    return {"rows_s": by_row, "groups_s": by_group, "scores": scores, "device": device, "jax": jax.__version__}


def run_side(args, python, side):
    """Runs a side in a process of its own; returns the JSON that it prints."""
    command = [python, str(Path(__file__).resolve()), "--side", side, "--vocab", str(args.vocab.resolve())]
    command += ["--work", str(args.work), "--rows", str(args.rows), "--images-per-prompt", str(args.images_per_prompt)]
    command += ["--batch-size", str(args.batch_size), "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args):
    """Runs both sides and prints the comparison."""
    if not args.original_python:
        raise SystemExit("give --original-python, the Python of an environment with image-reward 1.5")
    if not (args.work / "ImageReward.pt").is_file() or not all(path.is_file() for _, path in rows_of(args)):
        run_side(args, args.original_python, "prepare")
    results = {"original": [], "ours": []}
    for _ in range(args.rounds):
        results["original"].append(run_side(args, args.original_python, "original"))
        results["ours"].append(run_side(args, sys.executable, "ours"))
    first = {side: rounds[0] for side, rounds in results.items()}
    speeds = {
        f"{what} of {side}": args.rows / statistics.median(one[f"{what}_s"] for one in rounds)
        for side, rounds in results.items()
        for what in ("rows", "groups")
    }
    report = {
        "rows": args.rows,
        "images_per_prompt": args.images_per_prompt,
        "images_per_second": {name: round(speed, 4) for name, speed in speeds.items()},
        "ratio_rows": round(speeds["rows of ours"] / speeds["rows of original"], 3),
        "ratio_groups": round(speeds["groups of ours"] / speeds["groups of original"], 3),
        "largest_score_difference": max(
            abs(a - b) for a, b in zip(first["original"]["scores"], first["ours"]["scores"])
        ),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "devices": {side: result["device"] for side, result in first.items()},
        "versions": {
            "python": platform.python_version(),
            "jax": first["ours"]["jax"],
            "torch": first["original"]["torch"],
        },
        "cores": len(os.sched_getaffinity(0)),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report, indent=2))


def main():
    args = parse_args()
    if args.side:
        args.work = args.work.resolve()
        print(json.dumps({"prepare": prepare, "original": original, "ours": ours}[args.side](args)))
    elif args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        args.work = args.work.resolve()
        compare(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args.work = Path(folder)
            compare(args)


if __name__ == "__main__":
    main()
