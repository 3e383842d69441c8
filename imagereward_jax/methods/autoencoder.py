"""Training the VAE by reconstruction with a weak pull of its latents to a normal distribution (arXiv 1312.6114)."""

import jax
import jax.numpy as jnp


def make_autoencoder_loss(autoencode, kl_weight):
    """Squared plus absolute error of the reconstruction, and `kl_weight` times the KL divergence per latent number.

    Args:
        autoencode: (params, images in [0, 1], key) -> (reconstructed images, mean, logvar).

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). batch: "image" [B, H, W, 3] in [0, 1].
    """

    def loss(trainable, frozen, batch, key):
        images, mean, logvar = autoencode({**frozen, **trainable}, batch["image"], key)
        difference = images - batch["image"]
        squared, absolute = jnp.mean(jnp.square(difference)), jnp.mean(jnp.abs(difference))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        metrics = {"mse": squared, "kl": kl, "psnr": -10 * jnp.log10(squared), "latent_std": mean.std()}
        return squared + absolute + kl_weight * kl, jax.lax.stop_gradient(metrics)

    return loss
