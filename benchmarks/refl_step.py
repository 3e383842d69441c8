"""Times one ReFL step, ours against PyTorch's (diffusers), on the same machine in one run.

    python benchmarks/refl_step.py                       # a UNet of 64 to 256 channels on 32 x 32 latents
    python benchmarks/refl_step.py --preset sd15 --dtype bfloat16 --batch 1 4 8 --torch eager compile    # on a GPU
    python benchmarks/refl_step.py --preset sdxl --lora 4 --dtype bfloat16 --batch 1 4 --torch eager compile
    python benchmarks/refl_step.py --preset sdxl --lora 4 --dtype bfloat16 --torch --profile trace       # ours alone

A step is: `--sampler-steps` DDIM steps without gradient, one with, decoding by the VAE, a reward, the gradient by the
UNet (with `--lora RANK` by an adapter of its attention over a frozen base in `--dtype`), AdamW. Weights are random.
The reward is a resize to 224 and one linear map, so that the comparison is of the networks in common. PyTorch runs
eager with SDPA attention, and with UNet and decoder under torch.compile (`--torch`; with nothing after it ours runs
alone). Both sides recompute the same blocks in the backward pass. Each side runs in a process of its own, one after
the other, `--rounds` times in turn. The figures are medians over all steps.

Prints JSON: images/s, seconds per step, seconds of compiling (PyTorch's: of its first step, less the median of the
later ones), peak memory and utilisation of each, and ratios ours / PyTorch's. Utilisation is model FLOP/s, without what
is recomputed, over the FLOP/s of a large matrix product in `--dtype` (matrix_product_tflops; by jax, in the same run).
`--profile DIR` traces one more step of ours into DIR (for TensorBoard or Perfetto) and lists the operations that took
most of the device's time.

Peak memory is the largest resident size of the process less that before the networks are made (CPU), or the most that
the allocator held (GPU).
"""

import argparse
import datetime
import importlib.util
import json
import math
import statistics
import sys
import time

from common import (
    PRESETS,
    SCHEDULER,
    TOKENS,
    in_process,
    longest_operations,
    matrix_products_a_second,
    peak_of_jax,
    peak_of_torch,
    resident,
    versions,
)

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft")
TRAIN_STEPS, THRESHOLD, SCALE, LEARNING_RATE = 1000, 2.0, 1e-3, 1e-5
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what --lora adapts
PIXELS = 224  # of the reward


def pooled_features(unet):
    """Features of the pooled text embedding that an SDXL's UNet reads; None for a UNet without it."""
    if not unet.get("addition_embed_type"):
        return None
    return unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]


class LinearReward:
    """Resizes to `PIXELS` and applies one linear map; reads no prompt."""

    def apply(self, params, images, tokens):
        from imagereward_jax.rewards.preprocess import device_pixels

        return device_pixels(images, PIXELS).reshape(images.shape[0], -1) @ params


def open_pipeline(preset, **options):
    """Opens a pipeline of a preset's UNet and VAE. Its text encoders, of one layer, only fit them and never run."""
    from imagereward_jax.pipelines.families import from_architecture
    from imagereward_jax.pipelines.published_settings import StandInTokenizer

    pooled, width = pooled_features(preset["unet"]), preset["unet"]["cross_attention_dim"]
    widths = [width] if pooled is None else [width // 2, width - width // 2]
    encoders = {
        f"text_encoder{'_2' if index else ''}": {
            "vocab_size": 8,
            "bos_token_id": 6,
            "eos_token_id": 7,
            "hidden_size": size,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            **({"architectures": ["CLIPTextModelWithProjection"], "projection_dim": pooled} if index else {}),
        }
        for index, size in enumerate(widths)
    }
    networks = {"unet": preset["unet"], "vae": preset["vae"], "scheduler": SCHEDULER}
    return from_architecture(networks | encoders, StandInTokenizer(), **options)


def our_problem(arguments, remat):
    """(() -> (trainable, frozen, batch), the method's own loss, its sampler)."""
    import jax
    import jax.numpy as jnp

    from imagereward_jax.diffusion.samplers import make_sampler
    from imagereward_jax.methods import refl
    from imagereward_jax.models import lora
    from imagereward_jax.models.param_tree import join, split, trainable_mask
    from imagereward_jax.training.step import cast

    preset, dtype, batch = PRESETS[arguments.preset], jnp.dtype(arguments.dtype), arguments.batch[0]
    pipeline = open_pipeline(preset, dtype=dtype, remat=remat)
    if arguments.lora:
        pipeline = pipeline.with_lora("unet", "|".join(ATTENTION), rank=arguments.lora, alpha=arguments.lora)
    steps, pixels = arguments.sampler_steps, pipeline.default_size
    config = refl.Config(
        sampler="ddim",
        num_steps=steps + 1,
        stop_min=steps,
        stop_max=steps,
        height=pixels,
        width=pixels,
        threshold=THRESHOLD,
        scale=SCALE,
        rollout_quantization=arguments.quantization,
    )

    def initial():
        params = pipeline.init(jax.random.key(0), ("unet", "vae"))
        if arguments.lora:
            params = join(params, {"unet": lora.init(pipeline.networks["unet"], jax.random.key(2))})
        trainable, frozen = split(params, trainable_mask(params, ("unet",), lora=arguments.lora > 0))
        frozen = cast(frozen, dtype) | {"reward": jnp.full((PIXELS * PIXELS * 3,), 1e-4)}
        keys, pooled = jax.random.split(jax.random.key(3)), pooled_features(preset["unet"])
        width = preset["unet"]["cross_attention_dim"]
        cond = {"prompt_embeds": jax.random.normal(keys[0], (batch, TOKENS, width), dtype)}
        if pooled:
            cond["pooled_prompt_embeds"] = jax.random.normal(keys[1], (batch, pooled))
        return trainable, frozen, {"cond": cond, "reward": {}}

    sampler = make_sampler(config.sampler, pipeline.scheduler_config, config.num_steps)
    return initial, refl.make_loss(config, pipeline, LinearReward()), sampler


class GivenSource:
    """Source of the batches that the benchmark makes itself."""

    updates = images = 1

    def prepare(self, models, batch):
        return batch


def loss_function(arguments, remat):
    """(trainable, frozen, batch, key) -> the loss; with remat "none" its program recomputes nothing."""
    from imagereward_jax.methods.base import Models
    from imagereward_jax.models.param_tree import join

    _, loss, sampler = our_problem(arguments, remat)
    return lambda trainable, frozen, batch, key: loss(Models(join(frozen, trainable), tables=sampler), batch, key)[0]


def loss_inputs(initial):
    """Shapes of the arguments of `loss_function`."""
    import jax

    return jax.eval_shape(lambda: (*initial(), jax.random.key(0)))


def run_ours(arguments):
    """Times our step. Returns the figures as a dict."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from imagereward_jax.methods.base import Phase
    from imagereward_jax.planning.counts import flops
    from imagereward_jax.training.state import init_state
    from imagereward_jax.training.step import Fixed, make_train_step

    jax.devices()
    before = resident()
    initial, loss, sampler = our_problem(arguments, PRESETS[arguments.preset]["remat"])
    trainable, frozen, inputs = jax.jit(initial)()
    program = jax.make_jaxpr(jax.grad(loss_function(arguments, "none")))(*loss_inputs(initial))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=1e-2))
    state = init_state(trainable, optimizer, seed=0, ema=False)
    step = make_train_step((Phase("refl", loss, GivenSource()),), optimizer, dtype=jnp.dtype(arguments.dtype))
    fixed, batches = Fixed(frozen, tables={"refl": sampler}), {"refl": inputs}
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, fixed, batches).compile()
    compile_seconds = time.perf_counter() - start
    del trainable  # donated with the state
    times = []

    def run(state):
        start = time.perf_counter()
        state, metrics = compiled(state, fixed, batches)
        assert np.isfinite(float(metrics["refl/loss"])), "the loss is not finite"
        times.append(time.perf_counter() - start)
        return state

    for _ in range(arguments.iterations + 1):
        state = run(state)
    figures = {
        "times": times[1:],
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_of_jax(before),
        "device": jax.devices()[0].device_kind,
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "model_flops": flops(program, arguments.sampler_steps),
    }
    if arguments.profile:
        with jax.profiler.trace(arguments.profile):
            run(state)
        figures["longest_operations"] = longest_operations(arguments.profile)
    return figures


def torch_networks(arguments, device, dtype):
    """(UNet of random weights that train, or whose adapter does; frozen VAE), recomputing what the preset says."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    preset = PRESETS[arguments.preset]
    unet = UNet2DConditionModel(**preset["unet"]).to(device).train()
    vae = AutoencoderKL(**preset["vae"]).to(device, dtype).requires_grad_(False)
    if arguments.lora:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        unet.requires_grad_(False).to(dtype)
        options = {"r": arguments.lora, "lora_alpha": arguments.lora, "init_lora_weights": "gaussian"}
        unet.add_adapter(LoraConfig(**options, target_modules=list(ATTENTION)))
        cast_training_params(unet, dtype=torch.float32)
    if preset["remat"] != "none":
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
        vae.train()  # diffusers checkpoints in training mode alone; this VAE has neither dropout nor running statistics
    return unet, vae


def torch_reward(vae, decode, dtype, device):
    """latents -> `LinearReward`'s scores [B] of what `decode` makes of them."""
    import torch

    weight = torch.full((PIXELS * PIXELS * 3,), 1e-4, device=device)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device).view(1, 3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device).view(1, 3, 1, 1)

    def rewards_of(latents):
        images = (decode(latents.to(dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)
        images = torch.nn.functional.interpolate(images, (PIXELS, PIXELS), mode="bicubic", antialias=True)
        return ((images - mean) / std).permute(0, 2, 3, 1).flatten(1).float() @ weight

    return rewards_of


def time_torch(backward, unet, arguments, device, before):
    """Times updates of a UNet by the gradients that `backward()` leaves, which returns the loss; the figures."""
    import torch

    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-2)
    times = []
    for _ in range(arguments.iterations + 1):
        start = time.perf_counter()
        loss = backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item()), "the loss is not finite"
        times.append(time.perf_counter() - start)
    return {
        "times": times[1:],
        "compile_seconds": max(0.0, times[0] - statistics.median(times[1:])),
        "peak_bytes": peak_of_torch(before),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "trained_parameters": sum(weight.numel() for weight in weights),
    }


def run_torch(arguments):
    """Times the same step in PyTorch with diffusers' networks and SDPA attention."""
    import torch
    from diffusers import DDIMScheduler

    preset, batch, steps = PRESETS[arguments.preset], arguments.batch[0], arguments.sampler_steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, half, dtype = resident(), arguments.dtype == "bfloat16", getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    unet, vae = torch_networks(arguments, device, dtype)
    decode = vae.decode
    if arguments.side == "compile":
        unet.compile()
        decode = torch.compile(decode)
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS, **SCHEDULER)
    scheduler.set_timesteps(steps + 1)
    size, pooled = preset["unet"]["sample_size"], pooled_features(preset["unet"])
    context = torch.randn(batch, TOKENS, preset["unet"]["cross_attention_dim"], device=device, dtype=dtype)
    added = {}
    if pooled:
        time_ids = torch.tensor([[8 * size, 8 * size, 0, 0, 8 * size, 8 * size]] * batch, device=device)
        added = {"text_embeds": torch.randn(batch, pooled, device=device), "time_ids": time_ids}
    rewards_of = torch_reward(vae, decode, dtype, device)

    def denoise(latents, timestep):
        return unet(latents, timestep, context, added_cond_kwargs=added).sample.float()

    def backward():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            latents = torch.randn(batch, 4, size, size, device=device)
            with torch.no_grad():
                for timestep in scheduler.timesteps[:-1]:
                    latents = scheduler.step(denoise(latents, timestep), timestep, latents).prev_sample
            timestep = scheduler.timesteps[-1]
            clean = scheduler.step(denoise(latents, timestep), timestep, latents).pred_original_sample
            loss = torch.relu(THRESHOLD - rewards_of(clean)).mean() * SCALE
        loss.backward()
        return loss

    return time_torch(backward, unet, arguments, device, before)


def summary(runs, batch, model_flops, peak):
    """Medians over the rounds of one side; peak: FLOP/s of a matrix product."""
    seconds = statistics.median([t for run in runs for t in run["times"]])
    return {
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(batch / seconds, 4),
        "utilisation": round(model_flops / seconds / peak, 4),
        "compile_seconds": round(statistics.median([run["compile_seconds"] for run in runs]), 1),
        "peak_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
        "trained_parameters": runs[0]["trained_parameters"],
        "device": runs[0]["device"],
    }


def compare(arguments, batch, sides, options):
    """Runs all sides in turn with one batch size; returns the results as a dict."""
    runs = {side: [] for side in sides}
    peak = in_process(__file__, "product", **options)["products_a_second"]
    for index in range(arguments.rounds):
        for side in sides:
            last = side == "ours" and index == arguments.rounds - 1
            traced = {"profile": arguments.profile} if last and arguments.profile else {}
            runs[side].append(in_process(__file__, side, batch=batch, **options, **traced))
    ours = runs["ours"][-1]
    result = {
        "batch": batch,
        "matrix_product_tflops": round(peak / 1e12, 3),
        "model_tflop_per_step": round(ours["model_flops"] / 1e12, 4),
        **{side: summary(part, batch, ours["model_flops"], peak) for side, part in runs.items()},
    }
    for side in sides[1:]:
        result[f"against_{side}"] = {
            "ratio": round(result["ours"]["images_per_second"] / result[side]["images_per_second"], 3),
            "memory_ratio": round(result["ours"]["peak_mib"] / max(1, result[side]["peak_mib"]), 3),
        }
    if arguments.profile:
        result["longest_operations"] = ours["longest_operations"]
    return result


def sides_of(torch_sides, lora):
    """["ours", *torch_sides]; ours alone, with a note, if PyTorch's packages are not installed."""
    needed = ("torch", "diffusers", *(("peft",) if lora else ()))
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent and torch_sides:
        print(f"note: {', '.join(absent)} not installed: PyTorch's side is left out", file=sys.stderr)
    return ["ours"] if absent else ["ours", *torch_sides]


def print_report(arguments, results):
    """Prints date, versions, settings and results as JSON."""
    settings = {name: value for name, value in vars(arguments).items() if name != "side"}
    report = {"date": str(datetime.date.today()), "versions": versions(*PACKAGES), "settings": settings}
    print(json.dumps({**report, **results}, indent=2))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter; 0: all weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--sampler-steps", type=int, default=4, help="steps without gradient")
    parser.add_argument(
        "--quantization", choices=("none", "int8", "fp8"), default="none", help="of ours in those steps"
    )
    parser.add_argument("--torch", nargs="*", choices=("eager", "compile"), default=["eager"], help="none: ours alone")
    parser.add_argument("--iterations", type=int, default=3, help="timed steps per round, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", metavar="DIR", help="trace a step of ours; with one --batch")
    parser.add_argument("--side", choices=("ours", "eager", "compile", "product"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("sampler_steps", "iterations", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    if arguments.lora < 0 or min(arguments.batch) < 1:
        parser.error("--lora: expected 0 or more; --batch: 1 or more")
    if arguments.profile and len(arguments.batch) > 1:
        parser.error("--profile traces one step: give one --batch")
    return arguments


def main():
    """See the module's docstring."""
    arguments = parse_args()
    if arguments.side == "product":
        print(json.dumps({"products_a_second": matrix_products_a_second(arguments.dtype)}))
        return
    if arguments.side:
        print(json.dumps((run_ours if arguments.side == "ours" else run_torch)(arguments)))
        return
    sides = sides_of(arguments.torch, arguments.lora)
    names = ("preset", "lora", "dtype", "sampler_steps", "quantization", "iterations")
    options = {name: getattr(arguments, name) for name in names}
    results = [compare(arguments, batch, sides, options) for batch in arguments.batch]
    print_report(arguments, {"results": results})


if __name__ == "__main__":
    main()
