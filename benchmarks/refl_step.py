"""One ReFL step, ours against PyTorch's (diffusers), on the same machine in one run.

    python benchmarks/refl_step.py                       # a UNet of 64 to 256 channels on 32 x 32 latents
    python benchmarks/refl_step.py --preset sd15 --dtype bfloat16 --batch 1 4 8      # Stable Diffusion 1.5 at 512
    px, on a GPU

A step is: `--sampler-steps` DDIM steps without gradient, one with, decoding by the VAE, a reward, the gradient by
the UNet, AdamW. Weights are random. The reward is a resize to 224 and one linear map, so that the networks in common
are what is compared. Both sides run in processes of their own, one after the other, `--rounds` times in turn; the
figures are medians over all steps. Prints JSON: images/s, seconds a step, compile seconds and peak memory of each,
and the ratio ours / PyTorch's.

Peak memory is the process's largest resident size less that before the networks are made (CPU), or what the allocator
held at most (GPU).
"""

import argparse
import datetime
import json
import statistics
import time

from common import (
    PRESETS,
    SCHEDULER,
    in_process,
    peak_of_jax,
    peak_of_torch,
    resident,
    unet_config,
    vae_config,
    versions,
)

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers")
TRAIN_STEPS, THRESHOLD, SCALE = 1000, 2.0, 1e-3


def run_ours(preset, batch, sampler_steps, iterations, dtype):
    """Times our step. Returns the figures as a dict."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from imagereward_jax.diffusion.rollout import rollout
    from imagereward_jax.diffusion.samplers import make_sampler
    from imagereward_jax.methods.refl import refl_loss
    from imagereward_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
    from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
    from imagereward_jax.rewards.images import device_pixels
    from imagereward_jax.training.step import Phase, cast, init_state, make_train_step

    jax.devices()
    before, dtype = resident(), jnp.dtype(dtype)
    unet_cfg = UNet2DConditionConfig.from_dict(unet_config(preset))
    vae_cfg = AutoencoderKLConfig.from_dict(vae_config(preset))
    graphs, params = {}, {}
    for name, build in {
        "unet": lambda rngs: UNet2DConditionModel(unet_cfg, dtype=dtype, remat=preset["remat"], rngs=rngs),
        "vae": lambda rngs: AutoencoderKL(vae_cfg, dtype=dtype, remat=preset["remat"], rngs=rngs),
    }.items():
        graphs[name] = nnx.graphdef(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
        params[name] = jax.jit(lambda build=build: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(0)), nnx.Param)))()
    sampler = make_sampler("ddim", SCHEDULER, sampler_steps + 1)
    stop = jnp.full((batch,), sampler_steps)
    size = preset["size"]

    def loss(trainable, frozen, batches, key):
        def denoise(unet):
            return lambda latents, timesteps: nnx.merge(graphs["unet"], unet)(latents, timesteps, batches["embeds"])

        noise = jax.random.normal(key, (batch, size, size, 4))
        state = rollout(denoise(jax.lax.stop_gradient(trainable["unet"])), sampler, noise, None, stop=stop)
        output = denoise(trainable["unet"])(sampler.model_input(state, stop), sampler.timestep(stop))
        latents = sampler.pred_original(state, output, stop) / 0.18215
        images = jnp.clip(nnx.merge(graphs["vae"], frozen["vae"]).decode(latents) / 2 + 0.5, 0, 1)
        pixels = device_pixels(images, 224).reshape(batch, -1)
        return refl_loss(pixels @ frozen["reward"], threshold=THRESHOLD, scale=SCALE), {}

    frozen = {"vae": cast(params.pop("vae"), dtype), "reward": jnp.full((224 * 224 * 3,), 1e-4)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=1e-2))
    state = init_state(params, optimizer, seed=0, ema=False)
    batches = {
        "embeds": jnp.asarray(
            np.random.default_rng(0).normal(size=(batch, preset["tokens"], unet_cfg.cross_attention_dim)), dtype
        )
    }
    step = make_train_step((Phase("refl", loss),), optimizer, dtype=dtype)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batches).compile()
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(iterations + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batches)
        assert np.isfinite(float(metrics["refl/loss"])), "the loss is not finite"
        times.append(time.perf_counter() - start)
    return {
        "times": times[1:],
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_of_jax(before),
        "device": jax.devices()[0].device_kind,
    }


def run_torch(preset, batch, sampler_steps, iterations, dtype):
    """Times the same step in PyTorch with diffusers' networks and SDPA attention."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, half = resident(), dtype == "bfloat16"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_config(preset)).to(device).train()
    vae = (
        AutoencoderKL(**vae_config(preset)).to(device, torch.bfloat16 if half else torch.float32).requires_grad_(False)
    )
    if preset["remat"] != "none":
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
        vae.train()  # diffusers checkpoints in training mode alone; this VAE has neither dropout nor running statistics
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS, **SCHEDULER)
    scheduler.set_timesteps(sampler_steps + 1)
    size, width = preset["size"], preset["unet"]["cross_attention_dim"]
    embeds = torch.randn(batch, preset["tokens"], width, device=device)
    weight = torch.full((224 * 224 * 3,), 1e-4, device=device)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device).view(1, 3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device).view(1, 3, 1, 1)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            latents = torch.randn(batch, 4, size, size, device=device)
            with torch.no_grad():
                for timestep in scheduler.timesteps[:-1]:
                    latents = scheduler.step(
                        unet(latents, timestep, embeds).sample.float(), timestep, latents
                    ).prev_sample
            timestep = scheduler.timesteps[-1]
            output = unet(latents, timestep, embeds).sample.float()
            clean = scheduler.step(output, timestep, latents).pred_original_sample
            images = (vae.decode(clean.to(vae.dtype) / 0.18215).sample.float() / 2 + 0.5).clamp(0, 1)
            images = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
            rewards = ((images - mean) / std).permute(0, 2, 3, 1).flatten(1).float() @ weight
            loss = torch.relu(THRESHOLD - rewards).mean() * SCALE
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    times = []
    for _ in range(iterations + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"times": times[1:], "compile_seconds": 0.0, "peak_bytes": peak_of_torch(before), "device": device}


def summary(runs, batch):
    """Medians over the rounds of one side."""
    seconds = statistics.median([t for run in runs for t in run["times"]])
    return {
        "seconds_per_step": round(seconds, 4),
        "images_per_second": round(batch / seconds, 4),
        "compile_seconds": round(statistics.median([run["compile_seconds"] for run in runs]), 1),
        "peak_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
        "device": runs[0]["device"],
    }


def main():
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--sampler-steps", type=int, default=4, help="steps without gradient")
    parser.add_argument("--iterations", type=int, default=3, help="timed steps a round, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run = run_ours if arguments.side == "ours" else run_torch
        preset = PRESETS[arguments.preset]
        print(
            json.dumps(run(preset, arguments.batch[0], arguments.sampler_steps, arguments.iterations, arguments.dtype))
        )
        return
    options = {name: getattr(arguments, name) for name in ("preset", "dtype", "sampler_steps", "iterations")}
    results = []
    for batch in arguments.batch:
        runs = {"ours": [], "torch": []}
        for _ in range(arguments.rounds):
            for side in runs:
                runs[side].append(in_process(__file__, side, batch=batch, **options))
        sides = {side: summary(part, batch) for side, part in runs.items()}
        ratio = sides["ours"]["images_per_second"] / sides["torch"]["images_per_second"]
        results.append({"batch": batch, **sides, "ratio": round(ratio, 3)})
    settings = {name: value for name, value in vars(arguments).items() if name != "side"}
    print(
        json.dumps(
            {
                "date": str(datetime.date.today()),
                "versions": versions(*PACKAGES),
                "settings": settings,
                "results": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
