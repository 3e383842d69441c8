"""The ordinary denoising loss on image-text pairs (DDPM, arXiv 2006.11239; latent diffusion, arXiv 2112.10752)."""

import jax
import jax.numpy as jnp

from imagereward_jax.config import ConfigError, field, require_given
from imagereward_jax.methods.base import Loss, Method, MethodConfig, Phase
from imagereward_jax.models.lora import dropout_key


class Config(MethodConfig):
    """config.method of supervised training."""

    uses = ("scratch", "pairs", "cache", "reward", "lora", "samples")
    defaults = {"eval.best": "eval/checker_rate"}

    train_text_encoder: bool = False
    timestep_power: float = field(
        1.0, above=0.0
    )  # timesteps are T * u^power, u uniform: below 1, noisy ones come more often
    snr_gamma: float = field(0.0, at_least=0.0)  # > 0: min-SNR weights of the loss; 5 is usual

    def check(self, config):
        """Pairs must be given, and encoded prompts and adapters exclude the text encoder's training."""
        require_given(config, "data.pairs")
        if self.train_text_encoder and config.data.cache:
            raise ConfigError(
                "config.data.cache holds encoded prompts: it cannot be used with method.train_text_encoder"
            )
        if self.train_text_encoder and config.lora.rank:
            raise ConfigError(
                "config.method.train_text_encoder: adapters are the denoiser's alone; set it to False, or "
                "config.lora.rank to 0"
            )


def make(config: Config, parts) -> Method:
    """One phase: the denoising loss on pairs. A reward, if there is one, scores the evaluation's samples."""
    pipeline = parts.pipeline
    loss = make_loss(pipeline, timestep_power=config.timestep_power, snr_gamma=config.snr_gamma)
    encoders = tuple(pipeline.text_encoders) if config.train_text_encoder else ()
    size = parts.config.data.image_size
    return Method(
        (Phase("denoising", loss, parts.pairs()),),
        trains=(pipeline.denoiser, *encoders),
        evaluate=parts.samples(size, size),
    )


def draw_timesteps(key: jax.Array, batch: int, num_timesteps: int, power: float = 1.0) -> jax.Array:
    """[batch] int32 in [0, num_timesteps): uniform for power 1, denser towards the noisy end below 1."""
    if power == 1.0:
        return jax.random.randint(key, (batch,), 0, num_timesteps)
    share = jax.random.uniform(key, (batch,)) ** power
    return jnp.minimum(jnp.floor(num_timesteps * share), num_timesteps - 1).astype(jnp.int32)


def make_loss(pipeline, weight: float = 1.0, *, timestep_power: float = 1.0, snr_gamma: float = 0.0) -> Loss:
    """Mean squared error between the network's output and its target at a random timestep.

    Args:
        pipeline: gives `denoise`, `encode`, `draw_latents` and `schedule`. weight: scales the loss.
        timestep_power: timesteps are T * u^timestep_power with u uniform in [0, 1): 1 is the usual uniform draw, less
            than 1 draws noisy timesteps more often.
        snr_gamma: > 0 weighs each sample by `min_snr_weights`.

    Returns:
        (models, batch, key) -> (loss, metrics). batch: "cond", and "image" [B, H, W, 3] in [0, 1] or its encoding
        "latent_mean" and "latent_logvar" [B, h, w, c]. The metric "mse" is not weighted.
    """
    schedule = pipeline.schedule

    def loss(models, batch, key):
        encode_key, noise_key, time_key = jax.random.split(key, 3)
        latents = jax.lax.stop_gradient(_draw_latents(pipeline, models.policy, batch, encode_key))
        noise = jax.random.normal(noise_key, latents.shape)
        timesteps = draw_timesteps(time_key, latents.shape[0], schedule.num_train_timesteps, timestep_power)
        noisy = schedule.add_noise(latents, noise, timesteps)
        with dropout_key(jax.random.fold_in(key, 1)):
            output = pipeline.denoise(models.policy, noisy, timesteps, batch["cond"])
        errors = jnp.mean(jnp.square(output - schedule.target(latents, noise, timesteps)), axis=(1, 2, 3))
        weights = min_snr_weights(schedule, timesteps, snr_gamma) if snr_gamma else 1.0
        return weight * jnp.mean(weights * errors), {"mse": errors.mean()}

    return loss


def _draw_latents(pipeline, params, batch, key):
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
