"""The ordinary denoising loss on image-text pairs (DDPM, arXiv 2006.11239; latent diffusion, arXiv 2112.10752).

A model of a flow is trained by flow matching as Stable Diffusion 3 was (arXiv 2403.03206, section 3.1), with the
weighting schemes of diffusers' training scripts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field, require_given
from imagereward_jax.diffusion.flow import FlowSchedule
from imagereward_jax.methods.base import Batch, Key, Loss, Method, MethodConfig, Models, Phase
from imagereward_jax.models.lora import dropout_key

WEIGHTINGS = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
SHIFTS = ("schedule", "none", "resolution")


class FlowLoss(NamedTuple):
    """Settings of flow matching, and their defaults; the fields of `Config` with these names."""

    weighting: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    precondition_outputs: bool = True
    timestep_shift: str = "schedule"


USUAL = FlowLoss()


class Config(MethodConfig):
    """config.method of supervised training."""

    uses = ("scratch", "pairs", "cache", "reward", "lora", "samples")
    defaults = {"eval.best": "eval/checker_rate"}

    # the CLIP text encoders train as well, with config.lora.rank by adapters of their own
    train_text_encoder: bool = False
    train_t5: bool = False  # with train_text_encoder: T5 too, for a model that starts from nothing
    timestep_power: float = field(
        1.0, above=0.0
    )  # timesteps are T * u^power, u uniform: below 1, noisy ones come more often
    snr_gamma: float = field(0.0, at_least=0.0)  # > 0: min-SNR weights of the loss; 5 is usual
    # The fields below are for flows alone, which the two above are not for.
    # "logit_normal", "mode": how noise levels are drawn; the others draw them evenly. "sigma_sqrt", "cosmap": weights
    weighting: str = field(USUAL.weighting, choices=WEIGHTINGS)
    logit_mean: float = USUAL.logit_mean  # of "logit_normal": below 0, noisy ones come more often
    logit_std: float = field(USUAL.logit_std, above=0.0)  # of "logit_normal": the spread of noise levels
    # of "mode": above 0, middle ones come more often
    mode_scale: float = field(USUAL.mode_scale, at_least=-1.0, at_most=1.75)
    # the error is that of the clean latents, sigma^2 times that of the velocity
    precondition_outputs: bool = USUAL.precondition_outputs
    # Of the noise levels: the schedule's own shift, none, or one that grows with the image as Flux has it
    timestep_shift: str = field(USUAL.timestep_shift, choices=SHIFTS)

    @property
    def flow(self) -> FlowLoss:
        """The settings of flow matching."""
        return FlowLoss(*(getattr(self, name) for name in FlowLoss._fields))

    @property
    def loss_options(self) -> dict[str, Any]:
        """Options of `make_errors`."""
        return {"timestep_power": self.timestep_power, "snr_gamma": self.snr_gamma, "flow": self.flow}

    def check(self, config):
        """Pairs must be given, and encoded prompts exclude the text encoders' training."""
        require_given(config, "data.pairs")
        if self.train_text_encoder and config.data.cache:
            raise ConfigError(
                "config.data.cache holds encoded prompts: it cannot be used with method.train_text_encoder"
            )
        if self.train_t5 and (config.lora.rank or not self.train_text_encoder):
            raise ConfigError(
                "config.method.train_t5 needs config.method.train_text_encoder, and config.lora.rank=0: no adapter is "
                "made for T5"
            )


def make(config: Config, parts) -> Method:
    """One phase: the denoising loss on pairs. A reward, if there is one, scores the evaluation's samples.

    Raises:
        ConfigError: a field is for other schedules than the model's.
    """
    return supervised(
        Phase("denoising", make_loss(parts.pipeline, **config.loss_options), parts.pairs()), config, parts
    )


def supervised(phase: Phase, config: Config, parts: Any) -> Method:
    """The method of one phase that trains the denoiser, and by `config.train_text_encoder` the text encoders."""
    pipeline = parts.pipeline
    encoders = pipeline.trained_encoders if config.train_text_encoder else ()
    encoders = tuple(pipeline.text_encoders) if config.train_t5 else encoders
    size = parts.config.data.image_size
    return Method((phase,), trains=(pipeline.denoiser, *encoders), evaluate=parts.samples(size, size))


def draw_timesteps(key: jax.Array, batch: int, num_timesteps: int, power: float = 1.0) -> jax.Array:
    """[batch] int32 in [0, num_timesteps): uniform for power 1, denser towards the noisy end below 1."""
    if power == 1.0:
        return jax.random.randint(key, (batch,), 0, num_timesteps)
    share = jax.random.uniform(key, (batch,)) ** power
    return jnp.minimum(jnp.floor(num_timesteps * share), num_timesteps - 1).astype(jnp.int32)


def make_loss(pipeline, weight: float = 1.0, **options: Any) -> Loss:
    """Mean squared error between the network's output and its target at a random timestep.

    Args:
        weight: scales the loss. pipeline, options: see `make_errors`.

    Returns:
        (models, batch, key) -> (loss, metrics), batch as for `make_errors`. The metric "mse" is not weighted.

    Raises:
        ConfigError: a setting is for other schedules than the model's.
    """
    errors_of = make_errors(pipeline, **options)

    def loss(models, batch, key):
        errors, weights = errors_of(models, batch, key)
        return weight * jnp.mean(weights * errors), {"mse": errors.mean()}

    return loss


def make_errors(
    pipeline, *, timestep_power: float = 1.0, snr_gamma: float = 0.0, flow: FlowLoss = USUAL
) -> Callable[[Models, Batch, Key], tuple[jax.Array, jax.Array]]:
    """Squared errors of the network's outputs at random timesteps, and their weights.

    Args:
        pipeline: gives `denoise`, `encode`, `draw_latents` and `schedule`.
        timestep_power: timesteps are T * u^timestep_power with u uniform in [0, 1): 1 is the usual uniform draw, less
            than 1 draws noisy timesteps more often.
        snr_gamma: > 0 weighs each sample by `min_snr_weights`.
        flow: how a flow draws timesteps and weighs errors; the two above are for schedules of betas alone.

    Returns:
        (models, batch, key) -> (mean squared errors [B], weights [B]). batch: "cond", and "image" [B, H, W, 3] in
        [0, 1] or its encoding "latent_mean" and "latent_logvar" [B, h, w, c].

    Raises:
        ConfigError: a setting is for other schedules than the model's.
    """
    schedule = pipeline.schedule
    of_flow = isinstance(schedule, FlowSchedule)
    _check_settings(of_flow, timestep_power, snr_gamma, flow)

    def errors_of(models, batch, key):
        encode_key, noise_key, time_key = jax.random.split(key, 3)
        latents = jax.lax.stop_gradient(draw_latents(pipeline, models.policy, batch, encode_key))
        noise = jax.random.normal(noise_key, latents.shape)
        if of_flow:
            share = draw_share(time_key, latents.shape[0], flow)
            timesteps = flow_timesteps(schedule, share, flow.timestep_shift, pipeline.image_tokens(latents.shape[1:]))
        else:
            timesteps = draw_timesteps(time_key, latents.shape[0], schedule.num_train_timesteps, timestep_power)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with dropout_key(jax.random.fold_in(key, 1)):
            output = pipeline.denoise(models.policy, noisy, timesteps, batch["cond"])
        errors = jnp.mean(jnp.square(output - schedule.target(latents, noise, timesteps)), axis=(1, 2, 3))
        if of_flow:
            return errors, flow_weights(schedule.sigmas(timesteps), flow)
        return errors, min_snr_weights(schedule, timesteps, snr_gamma) if snr_gamma else jnp.ones_like(errors)

    return errors_of


def _check_settings(of_flow, timestep_power, snr_gamma, flow):
    """Raises ConfigError for a setting without effect on the model's kind of schedule."""
    if of_flow:
        unset = {"timestep_power": (timestep_power, 1.0), "snr_gamma": (snr_gamma, 0.0)}
        why, way = "a flow, which has no min-SNR weights", "draw and weigh by config.method.weighting"
    else:
        unset = {name: (value, getattr(USUAL, name)) for name, value in flow._asdict().items()}
        why, way = "one of betas, and the field is for flows", "take timestep_power or snr_gamma"
    for name, (value, default) in unset.items():
        if value != default:
            raise ConfigError(
                f"config.method.{name}={value}: the model's schedule is {why}; leave it at {default}, and {way}"
            )


def draw_share(key: jax.Array, batch: int, settings: FlowLoss) -> jax.Array:
    """Draws `share_of_draws`, [batch]."""
    draw = jax.random.normal if settings.weighting == "logit_normal" else jax.random.uniform
    return share_of_draws(draw(key, (batch,)), settings)


def share_of_draws(draws: jax.Array, settings: FlowLoss) -> jax.Array:
    """How far along the training sigmas, from noise (0) to image (1), a sample lies, [B].

    Args:
        draws: [B], standard normal for "logit_normal", uniform in [0, 1) for the others.
    """
    if settings.weighting == "logit_normal":
        return jax.nn.sigmoid(settings.logit_mean + settings.logit_std * draws)
    if settings.weighting == "mode":
        return 1 - draws - settings.mode_scale * (jnp.cos(jnp.pi * draws / 2) ** 2 - 1 + draws)
    return draws


def flow_timesteps(schedule: FlowSchedule, share: jax.Array, shift: str, image_tokens: int) -> jax.Array:
    """Timesteps, float32 [B], of the training sigmas at `share` [B], shifted by `config.timestep_shift`."""
    total = schedule.num_train_timesteps
    table = schedule.train_sigmas()
    if shift != "schedule":
        table = dataclasses.replace(schedule, shift=1.0).train_sigmas()
    if shift == "resolution":
        table = schedule.shift_to_resolution(table, image_tokens)
    index = jnp.clip(jnp.floor(share * total), 0, total - 1).astype(jnp.int32)
    return total * jnp.asarray(table)[index]


def flow_weights(sigma: jax.Array, settings: FlowLoss) -> jax.Array:
    """Weights [B] of the squared errors of velocities at `sigma` [B], preconditioning included."""
    weights = jnp.ones_like(sigma)
    if settings.weighting == "sigma_sqrt":
        weights = sigma**-2.0
    elif settings.weighting == "cosmap":
        weights = 2 / (jnp.pi * (1 - 2 * sigma + 2 * sigma**2))
    # Preconditioned, x_t - sigma v is compared with x_0 = x_t - sigma (noise - x_0).
    return weights * jnp.square(sigma) if settings.precondition_outputs else weights


def draw_latents(pipeline, params, batch, key: jax.Array) -> jax.Array:
    """Draws latents [B, h, w, c] of the images "image" or of their encoding, see `make_loss`."""
    if "latent_mean" in batch:
        return pipeline.draw_latents(batch["latent_mean"], batch["latent_logvar"], key)
    return pipeline.encode(params, batch["image"], key)


def min_snr_weights(schedule, timesteps: jax.Array, gamma: float) -> jax.Array:
    """Min-SNR weights (arXiv 2303.09556, section 3.4) of the squared errors of the network's outputs, float32 [B].

    The error of the clean sample counts min(SNR, gamma) times; that of the noise SNR times less, that of the velocity
    SNR + 1 times less. At SNR 0 (noise alone) the noise's weight is 1, its limit.
    """
    snr = schedule.snr(timesteps)
    if schedule.prediction_type == "epsilon":
        return gamma / jnp.maximum(snr, gamma)
    clipped = jnp.minimum(snr, gamma)
    return clipped / (snr + 1) if schedule.prediction_type == "v_prediction" else clipped
