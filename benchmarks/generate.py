"""Times making images, ours against PyTorch's (diffusers), on the same machine in one run.

    python benchmarks/generate.py                              # a model of 64 to 256 channels at 256 px
    python benchmarks/generate.py --model sdxl --dtype bfloat16 --batch 1 4 --steps 30      # SDXL at 1024 px, on a GPU

Times the work of `imagereward_jax.generate` and of diffusers' pipelines from token ids to images: encoding the prompt
and a negative one, `--steps` DDIM steps with guidance, decoding. Both sides have the same random weights, ids and
initial noise. PyTorch runs eager with SDPA attention, and with UNet and decoder under torch.compile (`--torch`). Each
side runs in a process of its own, one after the other, `--rounds` times in turn. The figures are medians over all
calls.

Prints JSON: images/s, seconds per call (and CPU seconds, which other work on the machine disturbs less), seconds of
compiling (PyTorch's: of its first call, less the median of the later ones) and peak memory of each side, ratios ours /
PyTorch's, and the largest and mean difference of the images, whose values are in [0, 1]. Ours runs alone if diffusers
and transformers are not installed.
"""

import argparse
import datetime
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from common import (
    PRESETS,
    SCHEDULER,
    in_process,
    peak_of_jax,
    peak_of_torch,
    resident,
    versions,
)

from imagereward_jax.pipelines.families import SD1, SDXL

MODELS = {
    "tiny": {
        "unet": PRESETS["small"]["unet"],
        "vae": PRESETS["small"]["vae"],
        "text_encoder": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    },
    "sd15": SD1,
    "sdxl": SDXL,
}
START, END, LENGTH = 49406, 49407, 77  # of CLIP's token ids
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")
NORMALS = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)


def weight(key, shape):
    """Random tensor of a PyTorch key: variance 1 / inputs, norms about 1, biases small."""
    start = zlib.crc32(key.encode()) % NORMALS.size
    noise = np.resize(np.roll(NORMALS, -start), shape)
    if len(shape) == 1:
        return (1 if key.endswith("weight") else 0) + np.float32(0.1) * noise
    return noise * np.float32(np.prod(shape[1:]) ** -0.5)


def token_ids(prompt):
    """Token ids [77] that stand in for a prompt's."""
    words = np.random.default_rng(zlib.crc32(prompt.encode())).integers(0, START, 12)
    return np.array([START, *words, *[END] * (LENGTH - 1 - len(words))])


def initial_noise(arguments):
    """Standard normal [B, h, w, 4]."""
    size = arguments.resolution // 8
    return np.random.default_rng(1).standard_normal((arguments.batch[0], size, size, 4), dtype=np.float32)


class Ids:
    """Stands in for the tokenizers, so that their files are not needed."""

    model_max_length = LENGTH

    def __len__(self):
        return END + 1

    def __call__(self, prompts, **_):
        return {"input_ids": [token_ids(prompt) for prompt in prompts]}


def timed(call, iterations):
    """Calls once and `iterations` times more; returns (the first images, the first call's seconds, later figures)."""
    times, cpu_times, images = [], [], None
    for _ in range(iterations + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = call()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
        images = result if images is None else images
    return images, times[0], {"times": times[1:], "cpu_times": cpu_times[1:]}


def run_ours(arguments):
    """Times our pipeline. Returns (images [B, H, W, 3], figures)."""
    import jax
    import jax.numpy as jnp

    from imagereward_jax.diffusion.samplers import make_sampler
    from imagereward_jax.pipelines.sd1 import StableDiffusion1
    from imagereward_jax.pipelines.sdxl import StableDiffusionXL
    from imagereward_jax.weights import mapping

    family = StableDiffusionXL if arguments.model == "sdxl" else StableDiffusion1
    jax.devices()
    before, dtype = resident(), jnp.dtype(arguments.dtype)
    tokenizers = dict.fromkeys(family.text_encoders.values(), Ids())
    pipeline = family.from_configs(MODELS[arguments.model], SCHEDULER, tokenizers, dtype=dtype)
    params = {}
    for name, network in pipeline.networks.items():
        layout = mapping.torch_layout(network)
        tensors = {key: weight(shared_key(name, key), leaf.torch_shape) for key, leaf in layout.items()}
        params[name] = jax.device_put(mapping.from_torch(network, tensors, dtype=dtype))
    sampler = make_sampler("ddim", pipeline.scheduler_config, arguments.steps)
    count = arguments.batch[0]
    ids, negative = (pipeline.tokenize([prompt] * count) for prompt in ("a cat", "blurry"))

    def sample(params, ids, negative, noise):
        return pipeline.sample(params, ids, negative, noise, sampler=sampler, guidance_scale=arguments.guidance_scale)

    inputs = (params, ids, negative, initial_noise(arguments))
    start = time.perf_counter()
    compiled = jax.jit(sample).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    images, _, measured = timed(lambda: np.asarray(compiled(*inputs)), arguments.iterations)
    device = jax.devices()[0].device_kind
    return images, {
        **measured,
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_of_jax(before),
        "device": device,
    }


def shared_key(network, key):
    """Name by which both sides draw a tensor; transformers has dropped a prefix that published files have."""
    return f"{network} {key.removeprefix('text_model.')}"


def torch_pipeline(arguments, dtype):
    """Makes diffusers' pipeline with the random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings = {name: dict(config) for name, config in MODELS[arguments.model].items()}
    parts = {
        "unet": diffusers.UNet2DConditionModel(**settings.pop("unet")),
        "vae": diffusers.AutoencoderKL(**settings.pop("vae")),
    }
    for name, config in settings.items():
        projected = config.pop("architectures", None)
        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        parts[name] = kind(CLIPTextConfig(bos_token_id=START, eos_token_id=END, **config))
    for name, module in parts.items():
        state = {key: weight(shared_key(name, key), tuple(tensor.shape)) for key, tensor in module.state_dict().items()}
        module.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
        module.to(dtype).eval()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, **SCHEDULER)
    if arguments.model == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            **parts, tokenizer=None, tokenizer_2=None, scheduler=scheduler, add_watermarker=False
        )
    return diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def run_torch(arguments):
    """Times diffusers' pipeline. Returns (images [B, H, W, 3], figures)."""
    import torch

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)
    before = resident()
    pipeline = torch_pipeline(arguments, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.side == "compile":
        pipeline.unet = torch.compile(pipeline.unet)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    count = arguments.batch[0]
    noise = torch.from_numpy(initial_noise(arguments)).permute(0, 3, 1, 2).contiguous().to(device, dtype)

    def encode(prompt):
        ids = torch.from_numpy(token_ids(prompt)).to(device).expand(count, -1)
        if arguments.model != "sdxl":
            return {"prompt_embeds": pipeline.text_encoder(ids)[0]}
        first = pipeline.text_encoder(ids, output_hidden_states=True)
        second = pipeline.text_encoder_2(ids, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": second.text_embeds}

    @torch.no_grad()
    def sample():
        negative = {f"negative_{name}": value for name, value in encode("blurry").items()}
        images = pipeline(
            **encode("a cat"),
            **negative,
            latents=noise,
            height=arguments.resolution,
            width=arguments.resolution,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            output_type="pt",
        ).images
        return images.permute(0, 2, 3, 1).float().cpu().numpy()

    images, first, measured = timed(sample, arguments.iterations)
    return images, {
        **measured,
        "compile_seconds": max(0.0, first - statistics.median(measured["times"])),
        "peak_bytes": peak_of_torch(before),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def summary(runs, batch):
    """Medians over the rounds of one side."""
    seconds = statistics.median([t for run in runs for t in run["times"]])
    return {
        "images_per_second": round(batch / seconds, 4),
        "seconds_per_call": round(seconds, 4),
        "cpu_seconds_per_call": round(statistics.median([t for run in runs for t in run["cpu_times"]]), 4),
        "compile_seconds": round(statistics.median([run["compile_seconds"] for run in runs]), 1),
        "peak_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
        "device": runs[0]["device"],
    }


def compare(arguments, batch, sides, options):
    """Runs all sides in turn with one batch size; returns the results as a dict."""
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as work:
        for _ in range(arguments.rounds):
            for side in sides:
                runs[side].append(in_process(__file__, side, batch=batch, images=Path(work) / side, **options))
        images = {side: np.load(Path(work) / f"{side}.npy") for side in sides}
    result = {"batch": batch, **{side: summary(part, batch) for side, part in runs.items()}}
    for side in sides[1:]:
        difference = np.abs(images["ours"] - images[side])
        result[f"against_{side}"] = {
            "ratio": round(result["ours"]["images_per_second"] / result[side]["images_per_second"], 3),
            "memory_ratio": round(result["ours"]["peak_mib"] / max(1, result[side]["peak_mib"]), 3),
            "largest_difference": float(f"{difference.max():.3g}"),
            "mean_difference": float(f"{difference.mean():.3g}"),
        }
    return result


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--resolution", type=int, help="pixels, a multiple of 64; by default the model's own")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="images per call")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch", nargs="*", choices=("eager", "compile"), default=["eager"], help="none: ours alone")
    parser.add_argument("--iterations", type=int, default=2, help="timed calls per round, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "eager", "compile"), help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.resolution = arguments.resolution or MODELS[arguments.model]["unet"]["sample_size"] * 8
    if arguments.resolution < 64 or arguments.resolution % 64:
        parser.error(f"--resolution {arguments.resolution}: expected a multiple of 64")
    for name in ("steps", "iterations", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: expected at least 1")
    return arguments


def main():
    """See the module's docstring."""
    arguments = parse_args()
    if arguments.side:
        images, figures = (run_ours if arguments.side == "ours" else run_torch)(arguments)
        if not np.isfinite(images).all():
            raise SystemExit("the images contain NaN or Inf")
        np.save(arguments.images, images)
        print(json.dumps(figures))
        return
    sides = ["ours", *arguments.torch]
    if absent := [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]:
        if arguments.torch:
            print(f"note: {', '.join(absent)} not installed: PyTorch's side is left out", file=sys.stderr)
        sides = ["ours"]
    options = {name: getattr(arguments, name) for name in ("model", "resolution", "steps", "guidance_scale")}
    options |= {name: getattr(arguments, name) for name in ("dtype", "iterations")}
    results = [compare(arguments, batch, sides, options) for batch in arguments.batch]
    settings = {name: value for name, value in vars(arguments).items() if name not in ("side", "images")}
    report = {"date": str(datetime.date.today()), "versions": versions(*PACKAGES), "settings": settings}
    print(json.dumps({**report, "results": results}, indent=2))


if __name__ == "__main__":
    main()
