"""Diffusion-DPO (arXiv 2311.12908): people's preferences between two images of a prompt, without a reward.

Of both images, noised by the same noise to the same timestep, the network's error e is compared with that of the
weights that training starts from: what an image gains in likelihood is (e_reference - e) / 2, up to a factor. Models of
a flow compare velocities. IPO (2310.12036) and KTO (2402.01306, 2404.04465) are other losses of the same gains.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.config import field, require_given
from imagereward_jax.diffusion.flow import FlowSchedule
from imagereward_jax.methods.base import Batch, Loss, Mean, Method, MethodConfig, Phase
from imagereward_jax.methods.denoising import USUAL, draw_latents, draw_share, draw_timesteps, flow_timesteps
from imagereward_jax.methods.forward_process import mean_square
from imagereward_jax.models.lora import dropout_key

LOSSES = ("dpo", "ipo", "kto")


class PreferenceConfig(MethodConfig):
    """Fields of the loss."""

    loss: str = field("dpo", choices=LOSSES)  # KTO takes each image of a pair as one that is liked or not
    # how strongly the reference holds: 2000 (SD 1.5), 5000 (SDXL), 100 or 2000 (flows); diffusers' beta_dpo is half of
    # it. Learning rates of the paper fall with it: 2.048e-8 for 2000
    beta: float = field(2000.0, above=0.0)


class Config(PreferenceConfig):
    """config.method of offline DPO."""

    uses = ("preferences", "cache", "reward", "lora", "samples")
    needs_gradient = False

    def check(self, config):
        """Preferences and held-out prompts must be given."""
        for name in ("model.path", "data.preferences", "eval.prompts"):
            require_given(config, name)


def make(config: Config, parts: Any) -> Method:
    """One phase on pairs of images. A reward, if there is one, scores the evaluation's samples."""
    pipeline, size = parts.pipeline, parts.config.data.image_size
    return Method(
        (Phase("dpo", make_loss(config, pipeline), parts.preferences()),),
        trains=(pipeline.denoiser,),
        reference=True,
        evaluate=parts.samples(size, size),
    )


def make_loss(config: PreferenceConfig, pipeline: Any, copy: str | None = None) -> Loss:
    """The loss of pairs of images, the preferred one first.

    batch: "cond" [B, ...] of both images; "clean" [B, 2, h, w, c], or "image" [B, 2, H, W, 3] in [0, 1], or its
    encoding "latent_mean" and "latent_logvar" [B, 2, h, w, c]. Pairs whose "advantage" [B], if there is one, is 0 do
    not count.

    Args:
        copy: of `models.copies`, the weights to compare with; None for `models.reference`.
    """
    schedule = pipeline.schedule

    def draw_times(key, rows, shape):
        if isinstance(schedule, FlowSchedule):
            share = draw_share(key, rows, USUAL)
            return flow_timesteps(schedule, share, USUAL.timestep_shift, pipeline.image_tokens(shape))
        return draw_timesteps(key, rows, schedule.num_train_timesteps)

    def loss(models, batch, key):
        encode_key, noise_key, time_key = jax.random.split(key, 3)
        clean = _latents(pipeline, models.policy, batch, encode_key)
        rows, shape = clean.shape[0], clean.shape[2:]
        noise = jnp.repeat(jax.random.normal(noise_key, (rows, *shape)), 2, axis=0)  # the same for both
        timesteps = jnp.repeat(draw_times(time_key, rows, shape), 2, axis=0)
        cond = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch["cond"])
        clean = clean.reshape(-1, *shape)
        noisy, target = schedule.add_noise(clean, noise, timesteps), schedule.target(clean, noise, timesteps)
        with dropout_key(jax.random.fold_in(key, 1)):
            errors = mean_square(pipeline.denoise(models.policy, noisy, timesteps, cond) - target)
        base = models.copies[copy] if copy else models.reference
        before = jax.lax.stop_gradient(mean_square(pipeline.denoise(base, noisy, timesteps, cond) - target))
        errors, before = errors.reshape(-1, 2), before.reshape(-1, 2)
        counts = jnp.ones(rows) if "advantage" not in batch else (batch["advantage"] > 0).astype(jnp.float32)
        losses = preference_losses(config.loss, config.beta, errors, before, counts)
        return Mean((losses * counts).sum(), counts.sum()), pair_metrics(config.beta, errors, before, counts)

    return loss


def preference_losses(
    kind: str, beta: float, errors: jax.Array, before: jax.Array, counts: jax.Array | float = 1.0
) -> jax.Array:
    """Losses [B] of pairs.

    Args:
        kind: "dpo": -log sigmoid(inside), inside = -(beta / 2) ((e_w - e_l) - (the same of the reference)).
            "ipo": (inside - 1/2)^2, which is diffusers' loss times (beta / 2)^2.
            "kto": the mean over both images of 1 - sigmoid(+-beta (g - z)), g = e_reference - e and z its mean over the
            batch if that is positive, without gradient.
        errors, before: mean squared errors [B, 2], of the preferred image and the other, and those of the reference.
        counts: [B] 1 for pairs that count in z.
    """
    gains = before - errors
    if kind == "kto":
        total = 2 * jnp.maximum(jnp.sum(jnp.ones(len(gains)) * counts), 1)
        level = jax.lax.stop_gradient(jnp.maximum((gains.sum(1) * counts).sum() / total, 0.0))
        return (1 - jax.nn.sigmoid(beta * (gains - level) * jnp.array([1.0, -1.0]))).mean(1)
    inside = 0.5 * beta * (gains[:, 0] - gains[:, 1])
    return jnp.square(inside - 0.5) if kind == "ipo" else -jax.nn.log_sigmoid(inside)


def pair_metrics(beta: float, errors: jax.Array, before: jax.Array, counts: jax.Array) -> Mapping[str, Mean]:
    """The implicit accuracy, in which a tie counts half, its margin, and the raw errors.

    A gap that widens because both errors rise, that of the preferred image too, is the usual failure.
    """
    margin = 0.5 * beta * ((before - errors) @ jnp.array([1.0, -1.0]))
    values = {
        "accuracy": (margin > 0) + 0.5 * (margin == 0),
        "margin": margin,
        "chosen_error": errors[:, 0],
        "rejected_error": errors[:, 1],
        "chosen_error_before": before[:, 0],
        "rejected_error_before": before[:, 1],
    }
    return {name: Mean((value * counts).sum(), counts.sum()) for name, value in values.items()}


def _latents(pipeline: Any, params: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """Clean latents [B, 2, h, w, c] of both images, without gradient."""
    if "clean" in batch:
        return batch["clean"]
    names = [name for name in ("image", "latent_mean", "latent_logvar") if name in batch]
    flat = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}
    latents = jax.lax.stop_gradient(draw_latents(pipeline, params, flat, key))
    return latents.reshape(-1, 2, *latents.shape[1:])
