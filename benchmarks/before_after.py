"""The first figure of the README and the documentation: images that tuning made right, above what they were before.

    imagereward train --config drtune_tiny --config.seed=1
    python benchmarks/before_after.py --model runs/drtune_tiny/export --work runs/before_after

Both models draw the shapes world's 64 held-out prompts, four images each, from the same noise at guidance 3 in 20
steps. A rule-based checker reads each image; the reward learnt from what it said of images of other prompts. Prints how
many images are right before and after, and draws, of those that were wrong before and are right after, the ones whose
pixels changed most, one per prompt.
"""

import argparse
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imagereward_jax import generate
from imagereward_jax.data.shapes import fully_right, split

SIDE, GAP, LABEL, TEXT = 112, 8, 52, 38  # pixels of the figure


def images_of(model: str, prompts: Path, out: Path) -> np.ndarray:
    """Makes the images of a model: [64, 4, 32, 32, 3] uint8."""
    flags = f"--model {model} --prompts {prompts} --out {out} --guidance-scale 3 --steps 20 --num-images 4"
    if generate.main([*flags.split(), "--batch-size", "64", "--overwrite"]):
        raise SystemExit(1)
    count = len(prompts.read_text().splitlines())
    return np.stack([[np.asarray(Image.open(out / f"{n}_{k}.png")) for k in range(4)] for n in range(count)])


def draw(columns: list[list]) -> Image.Image:
    """Draws columns [before, after, prompt]: images [32, 32, 3] uint8 above each other, the prompt below."""
    sheet = Image.new("RGB", (LABEL + len(columns) * (SIDE + GAP), 2 * (SIDE + GAP) + TEXT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, name in enumerate(("before", "after")):
        pen.text((2, row * (SIDE + GAP) + SIDE // 2 - 7), name, fill="black", font=font)
    for column, (before, after, prompt) in enumerate(columns):
        x = LABEL + column * (SIDE + GAP)
        for row, image in enumerate((before, after)):
            enlarged = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, row * (SIDE + GAP)))
        text = "\n".join(textwrap.wrap(prompt, 17))
        pen.text((x, 2 * (SIDE + GAP) - 2), text, fill="black", font=ImageFont.load_default(11), spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the tuned model")
    parser.add_argument("--work", required=True, type=Path, help="folder for the images")
    parser.add_argument("--out", type=Path, default=Path("docs/images/before_after.png"))
    parser.add_argument("--columns", type=int, default=8)
    args = parser.parse_args()
    prompts = [caption.text for caption in split()[1]]
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    before, after = (images_of(m, file, args.work / n) for m, n in (("tiny-shapes", "before"), (args.model, "after")))
    counts, mended = Counter(), {}
    for number, prompt in enumerate(prompts):
        for old, new in zip(before[number], after[number]):
            right = bool(fully_right(prompt, old)), bool(fully_right(prompt, new))
            counts[right] += 1
            if right == (False, True):
                change = float(np.square(old.astype(np.float32) - new).mean())
                mended[prompt] = max(mended.get(prompt, (0.0,)), (change, old, new, prompt), key=lambda pair: pair[0])
    total = sum(counts.values())
    print(f"right before: {counts[True, True] + counts[True, False]} of {total}")
    print(f"right after: {counts[True, True] + counts[False, True]} of {total}")
    print(f"wrong before and right after: {counts[False, True]}; the other way: {counts[True, False]}")
    most = sorted(mended.values(), key=lambda pair: -pair[0])[: args.columns]
    draw([pair for _, *pair in most]).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
