"""Training the VAE by reconstruction with a weak pull of its latents to a normal distribution (arXiv 1312.6114)."""

import jax
import jax.numpy as jnp

from imagereward_jax.config import field, require_given
from imagereward_jax.methods.base import Loss, Method, MethodConfig, Phase


class Config(MethodConfig):
    """config.method of an autoencoder's training."""

    uses = ("scratch", "pairs", "reconstructions")
    defaults = {"eval.best": "eval/psnr"}

    kl_weight: float = field(1e-6, at_least=0.0)  # of the latents' divergence from a normal distribution

    def check(self, config):
        """Images must be given."""
        require_given(config, "data.pairs")


def make(config: Config, parts) -> Method:
    """One phase: reconstruction of the images of pairs; the other networks are exported as they were."""
    evaluate = parts.reconstructions()
    return Method(
        (Phase("autoencoder", make_loss(config, parts.pipeline), parts.images()),),
        trains=("vae",),
        reads=("vae",),
        evaluate=evaluate,
        export=parts.export_autoencoder(evaluate),
    )


def make_loss(config: Config, pipeline) -> Loss:
    """Squared plus absolute error of the reconstruction, and `kl_weight` times the KL divergence per latent number.

    Returns:
        (models, batch, key) -> (loss, metrics). batch: "image" [B, H, W, 3] in [0, 1].
    """

    def loss(models, batch, key):
        mean, logvar = pipeline.encode_moments(models.policy, batch["image"])
        latents = pipeline.draw_latents(mean, logvar, key)
        difference = pipeline.decode(models.policy, latents) - batch["image"]
        squared, absolute = jnp.mean(jnp.square(difference)), jnp.mean(jnp.abs(difference))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        metrics = {"mse": squared, "kl": kl, "psnr": -10 * jnp.log10(squared), "latent_std": mean.std()}
        return squared + absolute + config.kl_weight * kl, jax.lax.stop_gradient(metrics)

    return loss
