"""Shared by the policy gradients on the sampler's steps (DDPO, GRPO): windows, samples with log-probabilities, loss.

Each step samples images with the present weights, keeping every state of the sampler and its log-probability.
Advantages say of each sampler step whether it is to become more probable; the ratio of new to old probability is
clipped (PPO, arXiv 1707.06347).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.config import ConfigError, field
from imagereward_jax.diffusion.flow import is_flow
from imagereward_jax.diffusion.rollout import Record, rollout
from imagereward_jax.diffusion.sampler import Sampler, SamplerState, Transition, log_prob, negative_distance
from imagereward_jax.diffusion.samplers import NOISY_FLOWS
from imagereward_jax.methods.base import STEPS, Batch, Key, Loss, Method, Peak, Phase
from imagereward_jax.methods.on_policy import OnPolicyConfig, bind_denoiser, conditions_of, draw_noise

DENSITIES = {"cps": negative_distance}  # of others `log_prob`
# (transition, batch) -> (logarithm of the ratio [B], weight of the sample's loss, [B] or one for all).
LogRatio = Callable[[Transition, Batch, Sampler], tuple[jax.Array, jax.Array | float]]


class Window(NamedTuple):
    """The sampler's steps that add noise and train; the others are deterministic.

    Attributes:
        size: how many, consecutive. low, high: where they may lie, low <= step < high.
        move: "none" (they begin at low), "random" (drawn at every round) or "slide".
        every: training steps after which a sliding window moves by one step; at the end it begins at low again.
    """

    size: int
    low: int
    high: int
    move: str = "none"
    every: int = 1

    def start(self, training_step: Callable[[], jax.Array], key: Key) -> jax.Array | int:
        """The first step; training_step: gives the number of the training step."""
        places = self.high - self.low - self.size + 1
        if self.move == "random":
            return jax.random.randint(key, (), self.low, self.low + places)
        return self.low + (training_step() // self.every % places if self.move == "slide" else 0)


class PolicyConfig(OnPolicyConfig):
    """config.method of policy gradients."""

    # whose steps add noise: ddim of schedules of betas; of flows flow_sde (Flow-GRPO), dance_sde (DanceGRPO), cps
    sampler: str = field("ddim", choices=("ddim", *NOISY_FLOWS))
    eta: float = field(1.0, at_least=0.0)  # noise of the steps; Flow-GRPO 0.7, DanceGRPO 0.3, CPS 0.8
    window_size: int | None = field(None, at_least=1)  # steps that add noise and train; None: all that can
    window_low: int = field(0, at_least=0)  # the window lies in [window_low, window_high)
    window_high: int | None = field(None, at_least=1)  # None: the end; Flow-GRPO-Fast: num_steps / 2
    # "random": drawn anew at every round (Flow-GRPO-Fast); "slide": from noisy to clean, and again (MixGRPO)
    window_move: str = field("none", choices=("none", "random", "slide"))
    window_every: int = field(25, at_least=1)  # training steps after which a sliding window moves by one sampler step
    timestep_fraction: float = field(1.0, above=0.0, at_most=1.0)  # share of each sample's steps that train, drawn anew
    clip_range: float = field(1e-4, above=0.0)  # the ratio counts within 1 +- this; log-probabilities are means
    state_dtype: str = field("float32", choices=("float32", "bfloat16"))  # of stored states, which are rounded first

    @property
    def noisy_steps(self) -> int:
        """Steps that can train, from the first: of flows the last one adds no noise, or hardly any."""
        return self.num_steps - (self.sampler in NOISY_FLOWS)

    @property
    def window(self) -> Window:
        """Steps that add noise and train."""
        high = self.noisy_steps if self.window_high is None else self.window_high
        size = high - self.window_low if self.window_size is None else self.window_size
        return Window(size, self.window_low, high, self.window_move, self.window_every)

    @property
    def trained_steps(self) -> int:
        """Sampler steps of each sample that an update trains on."""
        return int(self.window.size * self.timestep_fraction)

    def check(self, config):
        """Some steps must train."""
        super().check(config)
        if self.noisy_steps < 1:
            raise ConfigError(
                f"config.method.num_steps={self.num_steps}: the last step of {self.sampler} does not train"
            )
        low, high, size = self.window.low, self.window.high, self.window.size
        if not (low < high <= self.noisy_steps and 1 <= size <= high - low):
            raise ConfigError(
                f"config.method: a window of window_size={size} steps does not lie in [window_low={low}, "
                f"window_high={high}) among the {self.noisy_steps} steps of {self.sampler} that can train; window_high "
                "and window_size of None are all of them"
            )
        if self.window_move != "none" and size == high - low:
            raise ConfigError(
                f"config.method.window_move={self.window_move!r}: a window of {size} steps cannot move in "
                f"[{low}, {high}); pass a smaller --config.method.window_size"
            )
        if not self.trained_steps:
            raise ConfigError(
                f"config.method.timestep_fraction={self.timestep_fraction} leaves none of {self.window.size} steps "
                f"that could train (num_steps={self.num_steps})"
            )


class Tables(NamedTuple):
    """The sampler whose steps add noise, and the same without."""

    noisy: Sampler
    plain: Sampler


def make_tables(config: PolicyConfig, pipeline: Any) -> Tables:
    """The samplers of a config.

    Raises:
        ConfigError: the sampler is for another kind of schedule, or steps that train add no noise.
    """
    scheduler = pipeline.scheduler_config
    if is_flow(scheduler) != (config.sampler in NOISY_FLOWS):
        kind, fitting = ("a flow", NOISY_FLOWS) if is_flow(scheduler) else ("a schedule of betas", ("ddim",))
        raise ConfigError(
            f"config.method.sampler={config.sampler!r} does not fit scheduler_config.json "
            f"({scheduler.get('_class_name')}), which is {kind}: take {', '.join(fitting)}"
        )

    def sampler(eta):
        return pipeline.make_sampler(config.sampler, config.num_steps, eta, config.height, config.width)

    try:
        tables = Tables(sampler(config.eta), sampler(0.0))
    except ValueError as error:
        raise ConfigError(f"config.method: {error}") from error
    check_noise(tables.noisy, config, scheduler)
    return tables


def check_noise(sampler: Sampler, config: PolicyConfig, scheduler_config: dict[str, Any]) -> None:
    """Refuses a sampler with steps that train and add no noise, whose log-probability does not exist.

    Raises:
        ConfigError: naming the step and what it follows from.
    """
    window = config.window
    silent = window.low + np.flatnonzero(~(sampler.weights.random[window.low : window.high] > 0))
    if not len(silent):
        return
    step, fields = silent[-1], ("_class_name", "steps_offset", "set_alpha_to_one", "timestep_spacing")
    said = ", ".join(f"{name}={scheduler_config[name]!r}" for name in fields if name in scheduler_config)
    needed = "eta above 0"
    if config.sampler == "ddim":
        needed += " and a schedule with steps_offset=1 and set_alpha_to_one=false, as Stable Diffusion has it"
        needed += f", or window_high={silent[0]}, which leaves it out" if silent[0] > window.low else ""
    raise ConfigError(
        f"config.method: step {step + 1} of {config.num_steps} (timestep {sampler.timesteps[step]:g}) of "
        f"{config.sampler} with eta={config.eta:g} on scheduler_config.json ({said}) adds no noise, so its "
        f"log-probability is NaN; policy gradients need {needed}"
    )


def policy_method(
    name: str, config: PolicyConfig, parts: Any, options: dict[str, Any], *, reference: bool = False, **extras: Any
) -> Method:
    """The method of one phase, whose batches the present weights make.

    Args:
        options: of `Parts.explore`: assign, and those of rounds and groups. reference, extras: of `Method` and of
            `make_loss`.
    """
    pipeline = parts.pipeline
    tables = make_tables(config, pipeline)
    sample = make_sample(config, pipeline, means="log_ratio" in extras)
    choose = make_choose(config.window.size, config.trained_steps)
    source = parts.explore(sample=sample, choose=choose, tables=tables, **options)
    return Method(
        (Phase(name, make_loss(config, pipeline, **extras), source, tables.noisy),),
        trains=(pipeline.denoiser,),
        evaluate=parts.samples(config.height, config.width),
        reference=reference,
        shown=f"{name}/reward",
        limits={
            f"{name}/ratio_error": (
                config.clip_range,
                "before the first update of a step ratios should be 1; rounding alone is clipped now, so take "
                "config.dtype='float32' or a larger config.method.clip_range",
            )
        },
    )


def make_sample(config: PolicyConfig, pipeline: Any, *, means: bool = False) -> Any:
    """(models, batch, key) -> (images, rows): the conditions, "start" [B], the first step of the window, and of every
    sampler step, [B, S, ...], "latents", "following", "log_prob" and by `means` "mean" (see `Trajectory`).
    models.tables: `Tables`."""
    shape = pipeline.latent_shape(config.height, config.width)
    density, steps = DENSITIES.get(config.sampler, log_prob), np.arange(config.num_steps)
    record = Record(tuple(steps.tolist()), jnp.dtype(config.state_dtype), density, means)

    def sample(models, batch, key):
        noise_key, step_key = jax.random.split(key)
        rows, window = pipeline.rows(batch["cond"]), config.window
        start = window.start(lambda: batch["training_step"][0], jax.random.fold_in(key, 2))
        inside = (steps >= start) & (steps < start + window.size)
        rolled = rollout(
            bind_denoiser(config, pipeline, batch),
            models.tables.noisy.steps_where(inside, models.tables.plain),
            draw_noise(config, noise_key, batch, shape, rows),
            jax.random.split(step_key, rows),
            params=models.policy,
            record=record,
        )
        images = jnp.clip(pipeline.decode(models.policy, rolled.state.latents), 0.0, 1.0)
        latents, following, log_probs, *mean = (
            jnp.moveaxis(part, 0, 1) for part in rolled.trajectory if part is not None
        )
        recorded = {"latents": latents, "following": following, "log_prob": log_probs}
        recorded |= {"mean": mean[0]} if means else {}
        return images, {**conditions_of(batch), "start": jnp.full((rows,), start, jnp.int32), STEPS: recorded}

    return sample


def make_choose(window: int, count: int) -> Any:
    """(rows, rng) -> batch: `count` of the `window` steps from "start" of each sample, in an order of its own; "step"
    is their index."""

    def choose(rows, rng):
        rows = dict(rows)
        start = rows.pop("start")
        order = np.tile(np.arange(window, dtype=np.int32), (len(start), 1))
        order = start[:, None] + rng.permuted(order, axis=1)[:, :count]
        chosen = {name: array[np.arange(len(start))[:, None], order] for name, array in rows[STEPS].items()}
        return {**rows, STEPS: {**chosen, "step": order}}

    return choose


def make_loss(config: PolicyConfig, pipeline: Any, *, log_ratio: LogRatio | None = None, penalty: Any = None) -> Loss:
    """The loss of one sampler step of each sample.

    batch: `CONDITIONS`, "latents", "following" [B, h, w, c], "log_prob", "step", "advantage", "update" [B].
    models.tables: the sampler whose steps add noise.

    Args:
        log_ratio: of new to old probability; by default the difference of the log-probabilities.
        penalty: (transition, that of `models.reference`, step, sampler) -> [B], added to the loss; None for none.
    """
    density = DENSITIES.get(config.sampler, log_prob)

    def plain(transition, batch, sampler):
        return density(transition, batch["following"]) - batch["log_prob"], 1.0

    def loss(models, batch, key):
        sampler, step, latents = models.tables, batch["step"], batch["latents"].astype(jnp.float32)
        denoise = bind_denoiser(config, pipeline, batch)
        state = SamplerState(latents, jnp.zeros_like(latents))
        inputs = sampler.model_input(state, step), sampler.timestep(step), step
        transition = sampler.transition(state, denoise(models.policy, *inputs), step)
        change, weight = (log_ratio or plain)(transition, batch, sampler)
        ratio = jnp.exp(change)
        metrics = {"approx_kl": 0.5 * jnp.square(change).mean(), **ratio_metrics(ratio, batch, config.clip_range)}
        value = clipped_loss(ratio, batch["advantage"], config.clip_range, weight)
        if penalty is None:
            return value, metrics
        base = jax.lax.stop_gradient(denoise(models.reference, *inputs))
        distance = penalty(transition, sampler.transition(state, base, step), step, sampler).mean()
        return value + distance, {**metrics, "penalty": distance}

    return loss


def ratio_metrics(ratio: jax.Array, batch: Batch, clip_range: float) -> dict[str, Any]:
    """The share of ratios [B] that are clipped, and how far from 1 they are before a step's first update."""
    error = jnp.abs(ratio - 1.0)
    first = jnp.where(batch["update"] == 0, error, 0.0)
    return {"clipfrac": (error > clip_range).mean(), "ratio_error": Peak(first.max())}


def clipped_loss(
    ratio: jax.Array, advantage: jax.Array, clip_range: float, weight: jax.Array | float = 1.0
) -> jax.Array:
    """PPO's mean(weight max(-A r, -A clip(r, 1 - c, 1 + c))), over ratios and advantages [B]."""
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return (weight * jnp.maximum(-advantage * ratio, -advantage * clipped)).mean()
