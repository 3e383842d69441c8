"""Reward gradients through the sampler's steps: DRaFT, AlignProp, DRTune, FlowBP-Sparse and LeapAlign.

The sampler runs from noise to an image and the reward's gradient flows back through some of its steps. In the others
the model output is a constant; the latents never are. `config.truncation` chooses the steps with gradient:

- "last": the last K = `gradient_steps` (DRaFT-K, arXiv 2309.17400; AlignProp's fixed truncation, whose
  `truncated_backprop_timestep` is num_steps - K). K = num_steps is full backpropagation.
- "per_step": those with an index of at least T, uniform in [`truncate_min`, `truncate_max`] and drawn anew at every
  step (AlignProp, arXiv 2310.03739, as published, and TRL's `truncated_backprop_rand`).
- "uniform", "normal": the same with one T per rollout (AlignProp's code of 2024).
- "spaced": K equally spaced ones from a random start, without gradient through their inputs (DRTune, arXiv 2405.00760).
- "weighted": K different ones, step i with weight (i + 1)^`late_bias`, without gradient through their inputs
  (FlowBP-Sparse, arXiv 2606.11075; flows alone).
- "leap": two, k < j, from which one Euler step each leads from x_k to x_j and on to the image (LeapAlign, arXiv
  2604.15311; flows alone).

One T serves the whole batch; all else is drawn per sample.
"""

from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field
from imagereward_jax.diffusion.flow import is_flow
from imagereward_jax.diffusion.rollout import Denoise, Gradient
from imagereward_jax.diffusion.sampler import Sampler, SamplerState
from imagereward_jax.methods.base import Key, Loss, Method, Params
from imagereward_jax.methods.reward_tuning import (
    RewardTuningConfig,
    denoisers,
    draw_stop,
    roll,
    score,
    tuning_method,
)

DRAWN = ("per_step", "uniform", "normal")
OF_FLOWS = {"weighted": "FlowBP-Sparse", "leap": "LeapAlign"}


class Config(RewardTuningConfig):
    """config.method of reward gradients."""

    guidance_scale: float = 7.5  # at most 1: no guidance while training, half the work
    truncation: str = field(
        "last", choices=("last", "spaced", *DRAWN, *OF_FLOWS)
    )  # which steps carry gradient: see the module
    gradient_steps: int = field(1, at_least=1)  # K of "last", "spaced" and "weighted"
    truncate_min: int | None = field(None, at_least=0)  # None: 0 for "per_step", else 1
    truncate_max: int | None = field(None, at_least=0)  # None: num_steps for "per_step", else num_steps - 1
    truncate_mean: float = 42.0  # of "normal", of whose draws those within truncate_min and truncate_max are taken
    truncate_std: float = field(5.0, above=0.0)  # of "normal"
    late_bias: float = field(2.0, at_least=0.0)  # of "weighted": 0 draws all steps alike
    # of "weighted": from 0 to 1 the gradient grows by the share of the way from noise to image that no drawn step takes
    gradient_rescale: float = field(0.0, at_least=0.0)
    leap_share: float = field(
        0.3, at_least=0.0, at_most=1.0
    )  # of the gradient into the input of the second leap's call
    leap_tolerance: float = field(0.1, above=0.0)  # a sample counts 1 / (its two leap errors, each at least this)
    # DRTune's early stop: the clean latents are predicted at a step drawn from [stop_min, num_steps - 1]; None: none
    stop_min: int | None = field(None, at_least=0)
    noisings: int = field(0, at_least=0)  # DRaFT-LV: so many copies of an image, noised to the last step, count as well
    loss: str = field("linear", choices=("linear", "distance", "hinge"))  # target - r, |target - r|, relu(target - r)
    target: float = 0.0  # of the reward r; "linear" has the same gradient for every target
    scale: float = 1.0  # of the loss
    # DRaFT+: weight of the mean squared difference to the base model's outputs in steps with gradient; its code says
    # kl_coeff, but it is no KL divergence
    base_penalty: float = field(0.0, at_least=0.0)

    @property
    def truncate_range(self) -> tuple[int, int]:
        """The least and the largest T, both included."""
        per_step = self.truncation == "per_step"
        low = 1 - per_step if self.truncate_min is None else self.truncate_min
        return low, self.num_steps - 1 + per_step if self.truncate_max is None else self.truncate_max

    def check(self, config):
        """The chosen steps must be steps of the sampler, and fields of other truncations left alone."""
        super().check(config)
        total, spaced, drawn = self.num_steps, self.truncation == "spaced", self.truncation in DRAWN
        fixed = drawn or self.truncation == "leap"  # the number of steps with gradient
        if self.stop_min is not None and self.stop_min >= total:
            raise ConfigError(f"config.method.stop_min={self.stop_min}: expected less than num_steps={total}")
        most = total if self.stop_min is None or not spaced else self.stop_min + 1
        most = 1 if fixed else most
        if self.gradient_steps > most:
            why = f"truncation={self.truncation!r} draws the steps" if fixed else "the fewest steps that a sample takes"
            raise ConfigError(f"config.method.gradient_steps={self.gradient_steps}: expected at most {most} ({why})")
        if not drawn and (self.truncate_min, self.truncate_max) != (None, None):
            raise ConfigError(
                f"config.method.truncate_min and truncate_max have no effect with truncation={self.truncation!r}: "
                f"leave them at None, or pass --config.method.truncation={'|'.join(DRAWN)}"
            )
        (low, high), last = self.truncate_range, total - 1
        most = last + (self.truncation == "per_step")  # a single T past the last step would leave no gradient at all
        if drawn and not (low <= high <= most and low <= last):
            raise ConfigError(
                f"config.method: truncate_min={low}, truncate_max={high} must satisfy 0 <= truncate_min <= "
                f"truncate_max <= {most} and truncate_min <= {last} for num_steps={total}"
            )
        if self.truncation in OF_FLOWS:
            self._check_flow()
        if self.truncation == "normal" and not low <= self.truncate_mean < high + 1:
            raise ConfigError(
                f"config.method.truncate_mean={self.truncate_mean}: expected a step from truncate_min={low} to "
                f"truncate_max={high}; AlignProp's is 42 of 50"
            )

    def _check_flow(self):
        """Raises ConfigError for settings that FlowBP-Sparse and LeapAlign do not have."""
        name = f"{OF_FLOWS[self.truncation]} (truncation={self.truncation!r})"
        if self.sampler != "euler":
            raise ConfigError(f"config.method.sampler={self.sampler!r}: {name} follows Euler's steps; pass 'euler'")
        if self.truncation == "leap" and self.num_steps < 2:
            raise ConfigError(f"config.method.num_steps={self.num_steps}: {name} needs two steps at least")
        for field_name, unset in {"stop_min": None, "noisings": 0}.items():
            if (value := getattr(self, field_name)) != unset:
                raise ConfigError(
                    f"config.method.{field_name}={value}: {name} scores the sampled image alone; leave it at {unset}"
                )


def make(config: Config, parts: Any) -> Method:
    """The loss on prompts and, by `config.pretrain`, the denoising loss on pairs beside it.

    Raises:
        ConfigError: `config.truncation` is for flows, and the model's schedule is none.
    """
    scheduler = parts.pipeline.scheduler_config
    if config.truncation in OF_FLOWS and not is_flow(scheduler):
        raise ConfigError(
            f"config.method.truncation={config.truncation!r} ({OF_FLOWS[config.truncation]}) follows a flow, and the "
            f"model's scheduler is {scheduler.get('_class_name')}; take 'last' (DRaFT) or 'spaced' (DRTune)"
        )
    total = config.num_steps
    trips = {"last": total - config.gradient_steps} | dict.fromkeys(("spaced", *OF_FLOWS), total)
    trips = trips.get(config.truncation, config.truncate_range[0])
    reference = config.base_penalty > 0
    return tuning_method("reward_gradient", make_loss, config, parts, loop_trips=trips, reference=reference)


def make_loss(config: Config, pipeline: Any, reward: Any) -> Loss:
    """The loss of one batch of prompts; arguments, batch and tables as for `refl.make_loss`.

    `models.reference` is the base model that `config.base_penalty` compares with.
    """

    def loss(models, batch, key):
        stop_key, steps_key, noise_key, sampler_key, copies_key, dropout = jax.random.split(key, 6)
        rows = pipeline.rows(batch["cond"])
        denoise = denoisers(config, pipeline, batch, dropout)
        early, last = config.stop_min is not None, config.num_steps - 1
        stop = draw_stop(stop_key, rows, config.stop_min, last) if early else jnp.full((rows,), config.num_steps)
        gradient = draw_gradient(config, steps_key, stop)
        if config.truncation == "weighted":
            gradient = gradient._replace(call_scale=call_scale(models.tables, gradient.calls, config.gradient_rescale))
        options = {"stop": stop if early else None, "gradient": gradient}
        rolled = roll(config, pipeline, models, denoise, (noise_key, sampler_key), rows, **options)
        latents, tokens = rolled.predicted if early else rolled.state.latents, batch["reward"]
        if config.noisings:
            copies = noised_copies(models.tables, denoise[1], models.policy, latents, copies_key, config.noisings)
            latents = jnp.concatenate([latents[:, None], copies], 1).reshape(-1, *latents.shape[1:])
            tokens = jax.tree.map(lambda x: jnp.repeat(x, 1 + config.noisings, axis=0), tokens)
        rewards, metrics = score(pipeline, reward, models.policy, latents, tokens)
        metrics |= {"stop": stop.mean()} if early else {}
        weights = 1.0
        if rolled.leap_errors is not None:
            weights = 1 / jnp.maximum(rolled.leap_errors, config.leap_tolerance).sum(1)
            metrics |= {"leap_error": rolled.leap_errors.mean(), "leap_weight": weights.mean()}
        value = image_loss(rewards, config.loss, target=config.target, scale=config.scale, weights=weights)
        if models.reference is None:
            return value, metrics
        deviation = rolled.deviation.mean()
        return value + config.base_penalty * deviation, {**metrics, "base_deviation": deviation}

    return loss


def draw_gradient(config: Config, key: Key, stop: jax.Array) -> Gradient:
    """Draws the steps that carry gradient. stop: [B], how many steps each sample takes."""
    predict, (low, high) = config.stop_min is not None, config.truncate_range
    if config.truncation == "last":
        return Gradient(last=config.gradient_steps, predict=predict)
    if config.truncation == "spaced":
        return Gradient(calls=draw_spaced(key, stop + predict, config.gradient_steps), predict=predict)
    if config.truncation == "weighted":
        weights = (jnp.arange(config.num_steps) + 1.0) ** config.late_bias
        return Gradient(calls=draw_different(key, len(stop), weights, config.gradient_steps))
    if config.truncation == "leap":
        pairs = draw_different(key, len(stop), jnp.ones(config.num_steps), 2)
        return Gradient(leaps=jnp.sort(pairs, 1), leap_share=config.leap_share)
    last, steps = config.num_steps - low, jnp.arange(config.num_steps)
    if config.truncation == "per_step":
        marked = steps >= jax.random.randint(key, steps.shape, low, high + 1)
        return Gradient(last=last, steps=marked, predict=predict)
    if config.truncation == "uniform":
        first = jax.random.randint(key, (), low, high + 1)
    else:
        bounds = ((edge - config.truncate_mean) / config.truncate_std for edge in (low, high + 1))
        drawn = config.truncate_mean + config.truncate_std * jax.random.truncated_normal(key, *bounds)
        first = jnp.clip(drawn.astype(jnp.int32), low, high)
    return Gradient(last=last, steps=steps >= first, predict=predict)


def draw_spaced(key: Key, total: jax.Array, count: int) -> jax.Array:
    """[B, count] equally spaced step indices below `total` [B], from a random start."""
    stride = total // count
    start = jax.random.randint(key, total.shape, 0, total - (count - 1) * stride)
    return start[:, None] + stride[:, None] * jnp.arange(count)


def draw_different(key: Key, rows: int, weights: jax.Array, count: int) -> jax.Array:
    """[rows, count] different indices into `weights` [S], drawn one after another by the weights of those left."""
    keys, share = jax.random.split(key, rows), weights / weights.sum()
    draw = jax.vmap(lambda key: jax.random.choice(key, len(weights), (count,), replace=False, p=share))
    return draw(keys)


def call_scale(sampler: Sampler, calls: jax.Array, rescale: float) -> jax.Array:
    """[B] factors from 1 (`rescale` 0) to the whole way from noise to image over that of the steps `calls` [B, K]."""
    ways = sampler.sigma - jnp.append(sampler.sigma[1:], 0.0)
    return 1 + rescale * (ways.sum() / ways[calls].sum(1) - 1)


def noised_copies(
    sampler: Sampler, denoise: Denoise, params: Params, latents: jax.Array, key: Key, count: int
) -> jax.Array:
    """Clean latents [B, count, h, w, c] predicted from clean ones that were noised to the sampler's last step."""
    clean = jnp.repeat(jax.lax.stop_gradient(latents), count, axis=0)
    step = jnp.full(clean.shape[:1], sampler.num_steps - 1)
    noised = sampler.alpha[-1] * clean + sampler.sigma[-1] * jax.random.normal(key, clean.shape)
    state = SamplerState(noised / sampler.input_scale[-1], clean)
    output = denoise(params, sampler.model_input(state, step), sampler.timestep(step), step)
    return sampler.pred_original(state, output, step).reshape(-1, count, *latents.shape[1:])


def image_loss(
    rewards: jax.Array, kind: str, *, target: float, scale: float, weights: float | jax.Array = 1.0
) -> jax.Array:
    """The loss of the images' rewards [B], by `config.loss`; weights: of the images, [B] or one for all."""
    difference = target - rewards
    losses = {"linear": difference, "distance": jnp.abs(difference), "hinge": jax.nn.relu(difference)}
    return scale * jnp.mean(weights * losses[kind])
