"""DDPO, denoising diffusion policy optimization (arXiv 2305.13301), for any reward, also one without a gradient.

Each step samples images with the present weights, keeping every state of the sampler and its log-probability. Rewards,
compared with those of the same prompt, say of each sampler step whether it is to become more probable; the ratio of
new to old probability is clipped (PPO, arXiv 1707.06347).
"""

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.config import MAX_SIDE, MAX_STEPS, ConfigError, field
from imagereward_jax.diffusion.flow import is_flow
from imagereward_jax.diffusion.rollout import Record, rollout
from imagereward_jax.diffusion.sampler import Sampler, SamplerState, log_prob
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods.advantages import PromptAdvantages
from imagereward_jax.methods.base import STEPS, Loss, Method, MethodConfig, Peak, Phase, require_sampling

CONDITIONS = ("cond", "negative_cond")


class Config(MethodConfig):
    """config.method of DDPO. A step samples `rounds` times; its updates have config.batch_size samples each."""

    uses = ("prompts", "cache", "reward", "lora", "samples")
    defaults = {"eval.best": "eval/reward_mean"}
    needs_gradient = False

    num_steps: int = field(50, at_least=1, at_most=MAX_STEPS)  # DDIM steps of a generation
    eta: float = field(1.0, at_least=0.0, at_most=1.0)  # noise of the steps; with none there is no probability
    guidance_scale: float = 5.0  # in sampling and in training; at most 1: no guidance, half the work
    negative_prompt: str = ""
    height: int = field(512, at_least=1, at_most=MAX_SIDE)
    width: int = field(512, at_least=1, at_most=MAX_SIDE)
    rounds: int = field(1, at_least=1)  # of sampling per step; functions score one round while the next is sampled
    round_size: int | None = field(None, at_least=1)  # samples of a round, over all devices; None: config.batch_size
    epochs: int = field(1, at_least=1)  # times that a step trains on its samples
    timestep_fraction: float = field(1.0, above=0.0, at_most=1.0)  # share of each sample's steps that train, drawn anew
    clip_range: float = field(1e-4, above=0.0)  # the ratio counts within 1 +- this; log-probabilities are means
    advantage_clip: float = field(5.0, above=0.0)
    prompt_buffer: int = field(16, at_least=0)  # newest rewards per prompt that one is compared with; 0: the step's
    prompt_min_count: int = field(16, at_least=1)  # with fewer rewards of a prompt, all of the step's are compared with
    state_dtype: str = field("float32", choices=("float32", "bfloat16"))  # of stored states, which are rounded first

    def check(self, config):
        """What is read must be given, and sizes must fit."""
        require_sampling(config)
        samples = self.rounds * (self.round_size or config.batch_size)
        if samples % config.batch_size:
            raise ConfigError(
                f"config.method: rounds={self.rounds} of round_size={self.round_size} give {samples} samples per step, "
                f"which do not divide into updates of config.batch_size={config.batch_size}"
            )
        if not self.trained_steps:
            raise ConfigError(
                f"config.method.timestep_fraction={self.timestep_fraction} leaves none of num_steps={self.num_steps}"
            )
        if 0 < self.prompt_buffer < self.prompt_min_count:
            raise ConfigError(
                f"config.method.prompt_min_count={self.prompt_min_count} is never reached with "
                f"prompt_buffer={self.prompt_buffer}: lower it, or pass prompt_buffer=0 for statistics of whole steps"
            )
        if config.lora.dropout:
            raise ConfigError(
                f"config.lora.dropout={config.lora.dropout}: samples are made and scored without dropout; pass "
                "--config.lora.dropout=0"
            )

    @property
    def trained_steps(self) -> int:
        """Sampler steps of each sample that an update trains on."""
        return int(self.num_steps * self.timestep_fraction)


def make(config: Config, parts) -> Method:
    """One phase, whose batches the present weights make."""
    pipeline = parts.pipeline
    if is_flow(pipeline.scheduler_config):
        raise ConfigError(
            f"config.method.name='ddpo' needs the log-probabilities of DDIM's steps, and {pipeline.family} follows a "
            f"flow ({pipeline.scheduler_config.get('_class_name')}), whose steps add no noise: tune it by "
            "'reward_gradient' or 'refl'"
        )
    sampler = make_sampler("ddim", pipeline.scheduler_config, config.num_steps, config.eta)
    check_noise(sampler, config, pipeline.scheduler_config)
    source = parts.explore(
        negative_prompt=config.negative_prompt if config.guidance_scale > 1.0 else None,
        round_size=config.round_size,
        sample=make_sample(config, pipeline),
        assign=PromptAdvantages(
            buffer=config.prompt_buffer, min_count=config.prompt_min_count, clip=config.advantage_clip
        ),
        choose=make_choose(config.trained_steps),
        tables=sampler,
        rounds=config.rounds,
        epochs=config.epochs,
    )
    return Method(
        (Phase("ddpo", make_loss(config, pipeline), source, sampler),),
        trains=(pipeline.denoiser,),
        evaluate=parts.samples(config.height, config.width),
        shown="ddpo/reward",
        limits={
            "ddpo/ratio_error": (
                config.clip_range,
                "before the first update of a step ratios should be 1; rounding alone is clipped now, so take "
                "config.dtype='float32' or a larger config.method.clip_range",
            )
        },
    )


def check_noise(sampler: Sampler, config: Config, scheduler_config: dict) -> None:
    """Refuses a sampler with steps that add no noise, whose log-probability does not exist.

    Raises:
        ConfigError: naming the step and what it follows from.
    """
    silent = np.flatnonzero(~(sampler.weights.random > 0))
    if not len(silent):
        return
    step, fields = silent[-1], ("_class_name", "steps_offset", "set_alpha_to_one", "timestep_spacing")
    said = ", ".join(f"{name}={scheduler_config[name]!r}" for name in fields if name in scheduler_config)
    raise ConfigError(
        f"config.method: step {step + 1} of {config.num_steps} (timestep {sampler.timesteps[step]:g}) of ddim with "
        f"eta={config.eta:g} on scheduler_config.json ({said}) adds no noise, so its log-probability is NaN; DDPO "
        "needs eta above 0 and a schedule with steps_offset=1 and set_alpha_to_one=false, as Stable Diffusion has it"
    )


def make_sample(config: Config, pipeline):
    """(models, batch, key) -> (images, rows): the conditions, and of every sampler step, [B, S, ...], "latents",
    "following" and "log_prob" (see `Trajectory`). models.tables: the sampler."""
    shape = pipeline.latent_shape(config.height, config.width)
    record = Record(tuple(range(config.num_steps)), jnp.dtype(config.state_dtype))

    def sample(models, batch, key):
        noise_key, step_key = jax.random.split(key)
        rows = pipeline.rows(batch["cond"])
        rolled = rollout(
            pipeline.denoiser_for(*(batch.get(name) for name in CONDITIONS), config.guidance_scale),
            models.tables,
            jax.random.normal(noise_key, (rows, *shape)),
            jax.random.split(step_key, rows),
            params=models.policy,
            record=record,
        )
        images = jnp.clip(pipeline.decode(models.policy, rolled.state.latents), 0.0, 1.0)
        latents, following, log_probs = (jnp.moveaxis(part, 0, 1) for part in rolled.trajectory)
        conditions = {name: batch[name] for name in CONDITIONS if name in batch}
        return images, {**conditions, STEPS: {"latents": latents, "following": following, "log_prob": log_probs}}

    return sample


def make_choose(count: int):
    """(rows, rng) -> batch: `count` steps of each sample, in an order of its own; "step" is their index."""

    def choose(rows, rng):
        samples, total = rows[STEPS]["log_prob"].shape
        order = np.tile(np.arange(total, dtype=np.int32), (samples, 1))
        order = rng.permuted(order, axis=1)[:, :count]
        chosen = {name: array[np.arange(samples)[:, None], order] for name, array in rows[STEPS].items()}
        return {**rows, STEPS: {**chosen, "step": order}}

    return choose


def make_loss(config: Config, pipeline) -> Loss:
    """The loss of one sampler step of each sample.

    batch: `CONDITIONS`, "latents", "following" [B, h, w, c], "log_prob", "step", "advantage", "update" [B].
    models.tables: the sampler.
    """

    def loss(models, batch, key):
        sampler, step, latents = models.tables, batch["step"], batch["latents"].astype(jnp.float32)
        denoise = pipeline.denoiser_for(*(batch.get(name) for name in CONDITIONS), config.guidance_scale)
        state = SamplerState(latents, jnp.zeros_like(latents))
        output = denoise(models.policy, sampler.model_input(state, step), sampler.timestep(step), step)
        log_probs = log_prob(sampler.transition(state, output, step), batch["following"])
        change = log_probs - batch["log_prob"]
        ratio = jnp.exp(change)
        error = jnp.abs(ratio - 1.0)
        metrics = {
            "approx_kl": 0.5 * jnp.square(change).mean(),
            "clipfrac": (error > config.clip_range).mean(),
            "ratio_error": Peak(jnp.where(batch["update"] == 0, error, 0.0).max()),
        }
        return clipped_loss(ratio, batch["advantage"], config.clip_range), metrics

    return loss


def clipped_loss(ratio: jax.Array, advantage: jax.Array, clip_range: float) -> jax.Array:
    """PPO's mean(max(-A r, -A clip(r, 1 - c, 1 + c))), over ratios and advantages [B]."""
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return jnp.maximum(-advantage * ratio, -advantage * clipped).mean()
