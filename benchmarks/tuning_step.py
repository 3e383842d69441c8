"""Times a step of AlignProp or DDPO, ours against PyTorch's (diffusers), on the same machine in one run.

    python benchmarks/tuning_step.py --method alignprop --gradient-steps 1 --preset sd15 --lora 4 --dtype bfloat16
    python benchmarks/tuning_step.py --method alignprop --gradient-steps 10 --preset sd15 --lora 4 --dtype bfloat16
    python benchmarks/tuning_step.py --method ddpo --preset sd15 --lora 4 --dtype bfloat16

An AlignProp step: `--steps` DDIM steps with guidance, the last `--gradient-steps` of them with gradient, the VAE's
decoder, a reward, AdamW. A DDPO step: `--steps` DDIM steps at eta 1 with their log-probabilities, the decoder, the
reward on the way; then the gradient of every step of every image and one update. Networks, adapters, precision,
recomputing, reward and figures are as in refl_step.py, whose docstring explains them. PyTorch runs eager.
"""

import argparse
import json
import math
import statistics
import time

from common import (
    PRESETS,
    SCHEDULER,
    TOKENS,
    in_process,
    matrix_products_a_second,
    peak_of_jax,
    resident,
)
from refl_step import (
    ATTENTION,
    LEARNING_RATE,
    PIXELS,
    TRAIN_STEPS,
    GivenSource,
    LinearReward,
    open_pipeline,
    print_report,
    sides_of,
    summary,
    time_torch,
    torch_networks,
    torch_reward,
)

CLIP_RANGE = 1e-4


def given(arguments, batch, remat):
    """(pipeline, () -> (trainable, frozen, conditions)) of random weights and embeddings of `batch` prompts."""
    import jax
    import jax.numpy as jnp

    from imagereward_jax.models import lora
    from imagereward_jax.models.param_tree import join, split, trainable_mask
    from imagereward_jax.training.step import cast

    preset, dtype = PRESETS[arguments.preset], jnp.dtype(arguments.dtype)
    pipeline = open_pipeline(preset, dtype=dtype, remat=remat)
    if arguments.lora:
        pipeline = pipeline.with_lora("unet", "|".join(ATTENTION), rank=arguments.lora, alpha=arguments.lora)

    def initial():
        params = pipeline.init(jax.random.key(0), ("unet", "vae"))
        if arguments.lora:
            params = join(params, {"unet": lora.init(pipeline.networks["unet"], jax.random.key(2))})
        trainable, frozen = split(params, trainable_mask(params, ("unet",), lora=arguments.lora > 0))
        frozen = cast(frozen, dtype) | {"reward": jnp.full((PIXELS * PIXELS * 3,), 1e-4)}
        shape = (batch, TOKENS, preset["unet"]["cross_attention_dim"])
        keys = jax.random.split(jax.random.key(3))
        conditions = [{"prompt_embeds": jax.random.normal(key, shape, dtype)} for key in keys]
        return trainable, frozen, dict(zip(("cond", "negative_cond"), conditions))

    return pipeline, initial


def filled(initial):
    """Small random arrays of the shapes of `initial()`, whose initialisers take long to compile."""
    import jax
    import numpy as np

    block = 0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)
    return jax.tree.map(
        lambda leaf: jax.device_put(np.resize(block, leaf.shape).astype(leaf.dtype)), jax.eval_shape(initial)
    )


def step_of(name, loss, arguments, trainable, frozen, sampler, batch, on_policy):
    """((state, batch) -> (state, metrics), compiled; the first state; seconds of compiling)."""
    import jax
    import jax.numpy as jnp
    import optax

    from imagereward_jax.methods.base import Phase
    from imagereward_jax.training.state import init_state
    from imagereward_jax.training.step import Fixed, compile_options, make_train_step

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=1e-2))
    state = init_state(trainable, optimizer, seed=0, ema=False)
    step = make_train_step((Phase(name, loss, GivenSource()),), optimizer, dtype=jnp.dtype(arguments.dtype))
    fixed = Fixed(frozen, tables={name: sampler})
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, fixed, {name: batch})
    compiled = lowered.compile(compiler_options=compile_options(None, on_policy=on_policy))
    return (lambda state, batch: compiled(state, fixed, {name: batch})), state, time.perf_counter() - start


def run_alignprop(arguments):
    """Times our step of AlignProp. Returns the figures as a dict."""
    import jax

    from imagereward_jax.diffusion.samplers import make_sampler
    from imagereward_jax.methods import reward_gradient

    before = resident()
    pipeline, initial = given(arguments, arguments.batch, PRESETS[arguments.preset]["remat"])
    config = reward_gradient.Config(
        num_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        gradient_steps=arguments.gradient_steps,
        height=pipeline.default_size,
        width=pipeline.default_size,
    )
    sampler = make_sampler("ddim", pipeline.scheduler_config, config.num_steps)
    loss = reward_gradient.make_loss(config, pipeline, LinearReward())
    trainable, frozen, conditions = filled(initial)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    batch = {**conditions, "reward": {}}
    step, state, seconds = step_of("alignprop", loss, arguments, trainable, frozen, sampler, batch, False)
    del trainable  # donated with the state
    times = []
    for _ in range(arguments.iterations + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        assert math.isfinite(float(metrics["alignprop/loss"])), "the loss is not finite"
        times.append(time.perf_counter() - start)
    return figures(arguments, times, seconds, before, count)


def run_ddpo(arguments):
    """Times our step of DDPO: sampling, states to the host and back, the update. Returns the figures as a dict."""
    import jax
    import numpy as np

    from imagereward_jax.methods import ddpo, policy_gradient
    from imagereward_jax.methods.base import Models
    from imagereward_jax.models.param_tree import join
    from imagereward_jax.training.step import cast, compile_options

    before = resident()
    pipeline, initial = given(arguments, arguments.batch, PRESETS[arguments.preset]["remat"])
    size = pipeline.default_size
    config = ddpo.Config(num_steps=arguments.steps, guidance_scale=arguments.guidance, height=size, width=size)
    tables = policy_gradient.make_tables(config, pipeline)
    trainable, frozen, conditions = filled(initial)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    make, reward = policy_gradient.make_sample(config, pipeline), LinearReward()

    def sample(params, frozen, conditions, key):
        models = Models(join(frozen, cast(params, arguments.dtype)), tables=tables)
        images, rows = make(models, conditions, key)
        return reward.apply(models.policy["reward"], images, {}), rows

    options = compile_options(None, on_policy=True)
    choose = policy_gradient.make_choose(config.num_steps, config.trained_steps)
    start = time.perf_counter()
    sampled = jax.jit(sample).lower(trainable, frozen, conditions, jax.random.key(0)).compile(compiler_options=options)
    seconds = time.perf_counter() - start

    def minibatch(scores, rows):
        scores = np.asarray(scores)
        advantage = (scores - scores.mean()) / (scores.std() + 1e-8)
        rows = choose({**jax.device_get(rows), "advantage": advantage}, np.random.default_rng(0))
        return jax.device_put({**rows, "update": np.zeros(len(scores), np.int32)})

    batch = minibatch(*sampled(trainable, frozen, conditions, jax.random.key(0)))
    loss = policy_gradient.make_loss(config, pipeline)
    step, state, more = step_of("ddpo", loss, arguments, trainable, frozen, tables.noisy, batch, True)
    del trainable, batch
    times, errors, sampling = [], [], []
    for index in range(arguments.iterations + 1):
        start = time.perf_counter()
        batch = minibatch(*sampled(state.params, frozen, conditions, jax.random.key(index)))
        sampling.append(time.perf_counter() - start)
        state, metrics = step(state, batch)
        assert math.isfinite(float(metrics["ddpo/loss"])), "the loss is not finite"
        times.append(time.perf_counter() - start)
        errors.append(float(metrics["ddpo/ratio_error"].value))
    found = figures(arguments, times, seconds + more, before, count)
    return found | {"sampling_seconds": statistics.median(sampling[1:]), "ratio_error": max(errors)}


def figures(arguments, times, compile_seconds, before, count):
    """What every side reports."""
    import jax

    return {
        "times": times[1:],
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_of_jax(before),
        "device": jax.devices()[0].device_kind,
        "trained_parameters": count,
        "model_flops": model_flops(arguments),
    }


def model_flops(arguments):
    """FLOPs of a step without what is recomputed: from those of one denoiser call, forward and with its gradient."""
    import jax
    import jax.numpy as jnp

    from imagereward_jax.models.param_tree import join
    from imagereward_jax.planning.counts import flops

    pipeline, initial = given(arguments, 1, "none")  # what the backward pass would recompute does not count
    trainable, frozen, conditions = jax.eval_shape(initial)
    size = pipeline.default_size
    latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape(size, size)), jnp.float32)
    indices = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)

    def denoised(trainable, latents, frozen, conditions, step, timestep):
        denoise = pipeline.denoiser_for(conditions["cond"], conditions["negative_cond"], arguments.guidance)
        return denoise(join(frozen, trainable), latents, timestep, step).sum()

    def decoded(latents, frozen):
        return pipeline.decode(frozen, latents).sum()

    def count(function, *inputs):
        return flops(jax.make_jaxpr(function)(*inputs), 1)

    inputs = trainable, latents, frozen, conditions, *indices
    forward, decode = count(denoised, *inputs), count(decoded, latents, frozen)
    if arguments.method == "ddpo":
        with_gradient = count(jax.grad(denoised), *inputs)
        total = arguments.steps * (forward + with_gradient) + decode
    else:
        with_gradient = count(jax.grad(denoised, argnums=(0, 1)), *inputs)
        total = (arguments.steps - arguments.gradient_steps) * forward + arguments.gradient_steps * with_gradient
        total += count(jax.grad(decoded), latents, frozen)
    return total * arguments.batch


def run_torch(arguments):
    """Times the same step in PyTorch with diffusers' networks and SDPA attention."""
    import torch
    from diffusers import DDIMScheduler

    preset, batch = PRESETS[arguments.preset], arguments.batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, half, dtype = resident(), arguments.dtype == "bfloat16", getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    unet, vae = torch_networks(arguments, device, dtype)
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS, **SCHEDULER)
    scheduler.set_timesteps(arguments.steps)
    size = preset["unet"]["sample_size"]
    context = torch.randn(2 * batch, TOKENS, preset["unet"]["cross_attention_dim"], device=device, dtype=dtype)
    rewards_of = torch_reward(vae, vae.decode, dtype, device)
    alphas = scheduler.alphas_cumprod.to(device)
    timesteps = scheduler.timesteps.tolist()

    def denoise(latents, timestep):
        negative, positive = unet(torch.cat([latents] * 2), timestep, context).sample.float().chunk(2)
        return negative + arguments.guidance * (positive - negative)

    def transition(latents, index, eta):
        """(mean, standard deviation) of a DDIM step."""
        timestep = timesteps[index]
        before = timestep - TRAIN_STEPS // arguments.steps
        now, then = alphas[timestep], alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.to(device)
        noise = denoise(latents, timestep)
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        deviation = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        return then.sqrt() * clean + (1 - then - deviation**2).clamp(min=0).sqrt() * noise, deviation

    def log_prob(latents, mean, deviation):
        value = -((latents - mean) ** 2) / (2 * deviation**2) - deviation.log() - 0.5 * math.log(2 * math.pi)
        return value.mean(dim=(1, 2, 3))

    def alignprop():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            latents = torch.randn(batch, 4, size, size, device=device)
            for index in range(arguments.steps):
                with torch.set_grad_enabled(index >= arguments.steps - arguments.gradient_steps):
                    latents, _ = transition(latents, index, 0.0)
            loss = -rewards_of(latents).mean()
        loss.backward()
        return loss

    def ddpo():
        trajectory = []
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
            latents = torch.randn(batch, 4, size, size, device=device)
            for index in range(arguments.steps):
                average, deviation = transition(latents, index, 1.0)
                following = average + deviation * torch.randn_like(average)
                trajectory.append((latents, following, log_prob(following, average, deviation)))
                latents = following
            rewards = rewards_of(latents)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        for index, (latents, following, old) in enumerate(trajectory):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                ratio = (log_prob(following, *transition(latents, index, 1.0)) - old).exp()
                clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
                loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean() / arguments.steps
            loss.backward()
        return loss

    backward = {"alignprop": alignprop, "ddpo": ddpo}[arguments.method]
    return time_torch(backward, unet, arguments, device, before)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("alignprop", "ddpo"), default="alignprop")
    parser.add_argument("--preset", choices=("small", "sd15"), default="small")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter; 0: all weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--gradient-steps", type=int, default=1, help="K, of AlignProp")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--iterations", type=int, default=3, help="timed steps, after one that is not")
    parser.add_argument("--side", choices=("ours", "eager", "product"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("batch", "steps", "gradient_steps", "iterations"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    if arguments.gradient_steps > arguments.steps:
        parser.error(f"--gradient-steps {arguments.gradient_steps}: expected at most --steps {arguments.steps}")
    return arguments


def main():
    """See the module's docstring."""
    arguments = parse_args()
    if arguments.side == "product":
        print(json.dumps({"products_a_second": matrix_products_a_second(arguments.dtype)}))
        return
    if arguments.side:
        ours = {"alignprop": run_alignprop, "ddpo": run_ddpo}[arguments.method]
        print(json.dumps((ours if arguments.side == "ours" else run_torch)(arguments)))
        return
    settings = {name: value for name, value in vars(arguments).items() if name != "side"}
    sides = sides_of(["eager"], arguments.lora)
    peak = in_process(__file__, "product", dtype=arguments.dtype)["products_a_second"]
    runs = {side: in_process(__file__, side, **settings) for side in sides}
    ours = runs["ours"]
    result = {
        "matrix_product_tflops": round(peak / 1e12, 3),
        "model_tflop_per_step": round(ours["model_flops"] / 1e12, 4),
        **{side: summary([run], arguments.batch, ours["model_flops"], peak) for side, run in runs.items()},
        **{name: ours[name] for name in ("sampling_seconds", "ratio_error") if name in ours},
    }
    if "eager" in runs:
        result["ratio"] = round(result["ours"]["images_per_second"] / result["eager"]["images_per_second"], 3)
        result["memory_ratio"] = round(result["ours"]["peak_mib"] / max(1, result["eager"]["peak_mib"]), 3)
    print_report(arguments, result)


if __name__ == "__main__":
    main()
