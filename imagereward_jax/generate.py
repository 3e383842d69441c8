"""Makes images from text: `imagereward generate --model MODEL --prompt "a cat" --out DIR`.

Images are saved as DIR/PROMPT_K.png. PROMPT is the prompt's number (or its "id", if the file of prompts has one) and K
the image's number, both from 0. Image K depends on the prompt, on SEED + K and on the settings, not on the batch size
or on the other prompts. The settings are in the text chunks of the PNG.

Default sampler, steps and guidance scale are those in the generation_config.json of the last --lora or of the model.
"""

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagereward_jax.command import command
from imagereward_jax.compilation_cache import add_flag, use_compilation_cache
from imagereward_jax.config import MAX_SIDE, MAX_STEPS
from imagereward_jax.terminal import Parser, escape, program, say

if TYPE_CHECKING:
    import jax
    import numpy as np

    from imagereward_jax.diffusion.sampler import Sampler
    from imagereward_jax.pipelines.base import TextToImage
    from imagereward_jax.pipelines.blend import Blend
    from imagereward_jax.weights.generation import Generation


# The most that may be asked for: more would fill the memory, not make images.
LIMITS = {"num_images": 100_000, "batch_size": 4096, "steps": MAX_STEPS, "height": MAX_SIDE, "width": MAX_SIDE}
BLEND = ("base", "tuned_steps", "tuned_weight", "base_negative")  # flags of a tuned model together with its base


class GenerationError(RuntimeError):
    """An image contains NaN or Inf."""

    exit_status = 1


class ImageRequest(NamedTuple):
    """One image to make: its file, prompt, seed, and initial noise (None: drawn from the seed)."""

    path: Path
    prompt: str
    seed: int
    noise: "np.ndarray | None"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("generate"), description=__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="a diffusers folder, a single file (.safetensors, .ckpt), a folder of convert/from_diffusers.py, "
        "a built-in model, or a name on the hub",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to draw; may be given several times")
    prompts.add_argument(
        "--prompts", metavar="FILE", help="prompts, one per line (.txt), or .json, .csv, ... with prompt and id"
    )
    parser.add_argument(
        "--prompt-column", metavar="NAME", help="column of --prompts; default: text, prompt, caption or prompts"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the images")
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="an adapter that diffusers, PEFT, kohya or this package wrote; may be given several times",
    )
    parser.add_argument("--lora-scale", type=float, help="factor on the weights of all --lora: 0 none, 1 as trained")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="PATH[=WORD]",
        help="a textual-inversion embedding and the word in prompts that it stands for (default: the file's); may be "
        "given several times",
    )
    add_blend_flags(parser)
    parser.add_argument("--negative-prompt", default="", help="text to keep out of the images")
    parser.add_argument(
        "--guidance-scale", type=float, help="default: the model's; 1 or less: no guidance, half the work"
    )
    parser.add_argument(
        "--sampler",
        help="ddim, euler, dpmpp_2m, unipc, lcm, ...: docs/samplers.md lists them (default: the model's)",
    )
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise in the steps of ddim and tcd, from 0 to 1")
    parser.add_argument("--height", type=int, help="pixels; default: those the model was trained on")
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", metavar="FILE.npy", help="initial noise [images, h, w, c]; default: from the seed")
    parser.add_argument("--batch-size", type=int, default=4, help="images at a time on each device")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--variant", help='which weights of the model to read: "fp16" of a folder, "ema" (averaged) of a single file'
    )
    parser.add_argument(
        "--parts",
        default="",
        metavar="NAME=PATH,...",
        help="networks (files) and tokenizers (folders) to take from elsewhere: vae=FILE,tokenizer_3=FOLDER",
    )
    parser.add_argument("--prediction-type", help="epsilon or v_prediction, if the model's files do not state it")
    parser.add_argument("--overwrite", action="store_true", help="replace existing images")
    parser.add_argument("--grid", action="store_true", help="also save one sheet of all images, DIR/grid.png")
    add_flag(parser)
    return parser.parse_args(argv)


def add_blend_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags `BLEND`, which mix a tuned model with its base model (`pipelines.blend`)."""
    group = parser.add_argument_group("a tuned model together with the base model that it was tuned from")
    group.add_argument("--base", metavar="MODEL", help="the base model (with --lora by default --model without it)")
    group.add_argument(
        "--tuned-steps",
        metavar="FROM:TO",
        help="where the tuned model is used: 0.2:1 is all but the first fifth of the steps, which are the base model's",
    )
    group.add_argument(
        "--tuned-weight",
        metavar="W[:END[:POWER]]",
        help="its weight there, the base model has the rest; 0:1 rises with the steps, 0:1:2 with their square",
    )
    group.add_argument(
        "--base-negative", action="store_const", const=True, help="the negative prompt's prediction is the base's"
    )


def generate(args: argparse.Namespace) -> int:
    """Makes and saves the images; returns how many.

    Raises:
        ValueError, OSError: bad input, before anything is compiled.
        GenerationError: an image contains NaN or Inf.
    """
    _check_numbers(args)
    scale = 1.0 if args.lora_scale is None else args.lora_scale
    adapters = [(path, weight * scale) for path, weight in map(parse_lora, args.lora)]
    blend_options = parse_blend(args)
    prompts = read_prompts(args)
    _check_absent(args, [args.out / f"{name}_{k}.png" for name in prompts for k in range(args.num_images)])

    from imagereward_jax.pipelines import open_pipeline
    from imagereward_jax.pipelines.adapted import load_base, load_params
    from imagereward_jax.pipelines.blend import make_blend
    from imagereward_jax.pipelines.embeddings import embedding_notes, with_embeddings
    from imagereward_jax.storage.errors import writing
    from imagereward_jax.storage.lock import Lock
    from imagereward_jax.weights.embeddings import parse_embedding, read_embedding

    embeddings = [read_embedding(*parse_embedding(text)) for text in args.embedding]
    options = {"dtype": args.dtype, "variant": args.variant, "prediction_type": args.prediction_type}
    pipeline = with_embeddings(open_pipeline(args.model, parts=args.parts, **options), embeddings)
    take_defaults(args, pipeline.generation, adapters)
    size = args.height or pipeline.default_size, args.width or pipeline.default_size
    shape = pipeline.latent_shape(*size)
    sampler = pipeline.make_sampler(args.sampler, args.steps, args.eta, *size)
    blend = None if blend_options is None else make_blend(sampler.num_steps, **blend_options)
    requests = plan(args, prompts, read_noise(args.noise, (len(prompts) * args.num_images, *shape)))
    params, base = load_params(pipeline, adapters, args.dtype, keep_base=blend is not None and not args.base)
    if args.base:
        opened = with_embeddings(open_pipeline(args.base, **options), embeddings)
        base = load_base(pipeline, opened, params, args.dtype, f"--base {args.base}")
    for prompt in [*prompts.values(), args.negative_prompt]:
        if rest := pipeline.cut_off(prompt):
            say(f"warning: longer than {pipeline.max_tokens} tokens, left out: {rest!r}", file=sys.stderr)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    for note in embedding_notes(pipeline, [*prompts.values(), args.negative_prompt]):
        say(note)
    say(f"{args.sampler}, {args.steps} steps, guidance scale {args.guidance_scale:g}")
    draw = make_draw(pipeline, params, sampler, args, blend=blend, base=base)
    with Lock(args.out / ".lock", f"--out {args.out}"):
        _check_absent(args, [request.path for request in requests])  # again: another run may have made them meanwhile
        save_all(requests, draw, args)
    return len(requests)


def _check_numbers(args):
    for name, most in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value} should be from 1 to {most:,}")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta {args.eta} should be from 0 to 1")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed} should be from 0 to {2**31 - 1}")
    for name, usual in (("guidance_scale", "1 to 15"), ("lora_scale", "0 to 1")):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} {value} should be a number, usually from {usual}")
    if args.lora_scale is not None and not args.lora:
        raise ValueError("--lora-scale has no effect without --lora")


def parse_blend(args: argparse.Namespace) -> dict[str, Any] | None:
    """Parses the flags of `add_blend_flags` into options of `make_blend`; None without any of them.

    Raises:
        ValueError: a flag is malformed, has no effect, or there is no base model.
    """
    if all(getattr(args, name) is None for name in BLEND if name != "base"):
        if args.base:
            raise ValueError("--base has no effect without --tuned-steps, --tuned-weight or --base-negative")
        return None
    if not (args.base or args.lora):
        raise ValueError(
            "--tuned-steps, --tuned-weight and --base-negative mix a tuned model with its base: pass --base MODEL, or "
            "--lora, whose base is --model"
        )
    options = {"base_negative": bool(args.base_negative)}
    if args.tuned_steps is not None:
        options["steps"] = tuple(_numbers("--tuned-steps", args.tuned_steps, (2,), "two positions such as 0.2:1"))
    if args.tuned_weight is not None:
        first, *others = _numbers("--tuned-weight", args.tuned_weight, (1, 2, 3), "a number, or 0:1, or 0:1:2")
        options["weight"] = (first, others[0] if others else first)
        options["power"] = others[1] if others[1:] else 1.0
    return options


def _numbers(flag, text, counts, expected):
    """The numbers between the colons of a flag's value."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(map(math.isfinite, values)):
        raise ValueError(f"{flag} {text!r} should be {expected}")
    return values


def take_defaults(args: argparse.Namespace, generation: "Generation", adapters: list[tuple[str, float]]) -> None:
    """Fills in sampler, steps and guidance scale if not given: from the last adapter if it states them, else from the
    model's `generation`.

    Args:
        adapters: [(path, weight)] of --lora.

    Raises:
        ValueError: a negative prompt, or a base model for it, without guidance.
    """
    from imagereward_jax.weights.adapters import read_generation

    if adapters:
        generation = read_generation(adapters[-1][0]) or generation
    args.sampler = generation.sampler if args.sampler is None else args.sampler
    args.steps = generation.num_inference_steps if args.steps is None else args.steps
    args.guidance_scale = generation.guidance_scale if args.guidance_scale is None else args.guidance_scale
    for flag, value in (("--negative-prompt", args.negative_prompt), ("--base-negative", args.base_negative)):
        if value and args.guidance_scale <= 1:
            raise ValueError(f"{flag} has no effect with --guidance-scale {args.guidance_scale}; raise it above 1")


def parse_lora(text: str) -> tuple[str, float]:
    """Parses a --lora; returns (path, weight), the weight 1 if not given.

    Raises:
        ValueError: the weight is not a finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or not path or "/" in weight or "\\" in weight:
        return text, 1.0
    return path, _numbers(f"--lora {text}: the weight", weight, (1,), "a number, usually 0 to 1")[0]


def _check_absent(args, paths):
    """Refuses to replace existing images without --overwrite."""
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"--out {args.out} is a file; choose a folder")
    there = [path for path in [*paths, *[args.out / "grid.png"] * args.grid] if path.exists()]
    if there and not args.overwrite:
        raise FileExistsError(
            f"{there[0]} exists already ({len(there)} such files); choose another --out, or pass --overwrite"
        )


def read_prompts(args: argparse.Namespace) -> dict[str, str]:
    """Reads the prompts, by the name that their image files begin with.

    Raises:
        ValueError: a prompt or the file is empty, or an id cannot name a file.
    """
    if args.prompt is not None:
        if args.prompt_column is not None:
            raise ValueError("--prompt-column has no effect without --prompts")
        if empty := [i for i, prompt in enumerate(args.prompt) if not prompt.strip()]:
            raise ValueError(f"--prompt number {empty[0] + 1} is empty")
        prompts = {str(i): prompt for i, prompt in enumerate(args.prompt)}
    else:
        from imagereward_jax.data.prompts import load_named_prompts

        prompts = load_named_prompts(args.prompts, args.prompt_column)
    for prompt in (*prompts.values(), args.negative_prompt):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(f"the prompt {prompt!r} is not text in UTF-8: it holds half a character")
    return prompts


def read_noise(path: str | None, shape: tuple[int, ...]) -> "np.ndarray | None":
    """Reads the initial noise of all images, float32 of `shape`; None without a file."""
    if path is None:
        return None
    import numpy as np

    try:
        noise = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--noise {path}: not a .npy file of numbers ({error})") from error
    if not isinstance(noise, np.ndarray) or noise.shape != shape or not np.issubdtype(noise.dtype, np.floating):
        found = f"{noise.dtype} {list(noise.shape)}" if isinstance(noise, np.ndarray) else "several arrays"
        raise ValueError(f"--noise {path}: {found}; these images need floating point {list(shape)}")
    if not np.isfinite(noise).all():
        raise ValueError(f"--noise {path}: has values that are not finite numbers")
    return noise.astype(np.float32)


def plan(args: argparse.Namespace, prompts: dict[str, str], noise: "np.ndarray | None") -> list[ImageRequest]:
    """Lists the images to make, prompt by prompt."""
    requests = []
    for name, prompt in prompts.items():
        for k in range(args.num_images):
            own_noise = None if noise is None else noise[len(requests)]
            requests.append(ImageRequest(args.out / f"{name}_{k}.png", prompt, args.seed + k, own_noise))
    return requests


def image_key(prompt: str, seed: int) -> "jax.Array":
    """The key of one image: its initial noise is drawn from it, that of its steps from `fold_in(key, 1)`."""
    import jax

    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(prompt.encode()))


def make_draw(
    pipeline: "TextToImage",
    params: dict[str, Any],
    sampler: "Sampler",
    args: argparse.Namespace,
    *,
    blend: "Blend | None" = None,
    base: dict[str, Any] | None = None,
) -> "Callable[[Sequence[ImageRequest]], np.ndarray]":
    """Makes `draw(requests)`: images [n, H, W, 3] in [0, 1] of at most `draw.batch` requests, on all local devices.

    Args:
        blend, base: see `ImageSampler`.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from imagereward_jax.pipelines.sample import ImageSampler

    devices = jax.local_devices()
    mesh = Mesh(np.asarray(devices), ("data",))
    params, base = jax.device_put((params, base), NamedSharding(mesh, PartitionSpec()))
    sample = ImageSampler(
        pipeline,
        sampler,
        mesh,
        args.batch_size * len(devices),
        height=args.height or pipeline.default_size,
        width=args.width or pipeline.default_size,
        guidance_scale=args.guidance_scale,
        blend=blend,
    )

    def draw(requests):
        keys = [image_key(p.prompt, p.seed) for p in requests]
        shape = sample.latent_shape
        noise = [jax.random.normal(key, shape) if p.noise is None else p.noise for p, key in zip(requests, keys)]
        return sample(
            params,
            [p.prompt for p in requests],
            negative_prompts=[args.negative_prompt] * len(requests),
            noise=np.stack(noise),
            step_keys=jax.numpy.stack([jax.random.fold_in(key, 1) for key in keys]),
            base=base,
        )

    draw.batch = sample.batch_size
    return draw


def save_all(
    requests: Sequence[ImageRequest], draw: "Callable[[Sequence[ImageRequest]], np.ndarray]", args: argparse.Namespace
) -> None:
    """Draws and saves every image, and with --grid a sheet of all."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from imagereward_jax.storage.contact_sheet import contact_sheet, to_uint8
    from imagereward_jax.storage.files import save_image

    sheet = []
    with tqdm(total=len(requests), unit="image", desc=escape(args.out)) as progress:
        for start in range(0, len(requests), draw.batch):
            some = requests[start : start + draw.batch]
            for request, image in zip(some, draw(some)):
                if not np.isfinite(image).all():
                    raise GenerationError(
                        f"{request.path.name} ({request.prompt!r}) has values that are not numbers; the weights may be "
                        "broken, or need --dtype float32"
                    )
                pixels = Image.fromarray(to_uint8(image))
                save_image(request.path, pixels, settings_of(request, args))
                sheet += [image] * args.grid
            progress.update(len(some))
    if args.grid:
        columns = args.num_images if args.num_images > 1 and len(requests) > args.num_images else None
        save_image(args.out / "grid.png", contact_sheet(np.stack(sheet), [p.prompt for p in requests], columns=columns))


def settings_of(request: ImageRequest, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that make one image, for its text chunks."""
    settings = {
        "prompt": request.prompt,
        "negative_prompt": args.negative_prompt,
        "seed": request.seed if request.noise is None else f"noise {args.noise}",
        "model": args.model,
        **{name: getattr(args, name) for name in ("sampler", "steps", "eta", "guidance_scale", "dtype")},
        "lora": " ".join(args.lora) or None,
        "embedding": " ".join(args.embedding) or None,
        **{name: getattr(args, name) for name in ("lora_scale", *BLEND)},
    }
    return {name: value for name, value in settings.items() if value is not None}


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    use_compilation_cache(args.compilation_cache)
    count = generate(args)
    say(f"{count} images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
