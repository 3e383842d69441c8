"""ReFL, reward feedback learning (ImageReward, arXiv 2304.05977, algorithm 1).

For each prompt the sampler runs from noise to a random late step without gradient; there the clean latents are
predicted in one step, decoded and scored, and the reward's gradient flows through that one step.
"""

import jax
import jax.numpy as jnp

from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.models.lora import dropout_key
from imagereward_jax.models.param_tree import join
from imagereward_jax.rewards.mixed import apply_terms


def draw_stop(key, batch, stop_min, stop_max):
    """[B] stop indices, uniform in [stop_min, stop_max]."""
    return jax.random.randint(key, (batch,), stop_min, stop_max + 1)


def predict_images(
    pipeline, sampler, params, conditions, key, *, stop, latent_shape, guidance_scale=1.0, rollout_quantization="none"
):
    """Images [B, H, W, 3] in [0, 1] predicted at each sample's `stop` index; only that step carries gradient.

    Args:
        pipeline: gives `denoise` and `decode`. params: its weights by network.
        conditions: (cond, negative_cond or None) of the prompts.
        key: initial noise and the sampler's noise.
        latent_shape: (h, w, c).
        rollout_quantization: of the steps before `stop`, see `TextToImage.quantized`.
    """
    cond, negative = conditions

    def denoise(params, latents, timesteps):
        return pipeline.denoise(params, latents, timesteps, cond, negative, guidance_scale)

    frozen = pipeline.quantized(jax.lax.stop_gradient(params), rollout_quantization)

    def denoise_frozen(latents, timesteps):
        return denoise(frozen, latents, timesteps)

    noise_key, sampler_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (stop.shape[0], *latent_shape))
    state = rollout(denoise_frozen, sampler, noise, jax.random.split(sampler_key, stop.shape[0]), stop=stop)
    with dropout_key(jax.random.fold_in(key, 1)):
        output = denoise(params, sampler.model_input(state, stop), sampler.timestep(stop))
    images = pipeline.decode(params, sampler.pred_original(state, output, stop))
    return jnp.clip(images, 0.0, 1.0)


def refl_loss(rewards, *, threshold, scale):
    """mean(relu(threshold - reward)) * scale: a picture past the threshold is left alone."""
    return jnp.mean(jax.nn.relu(threshold - rewards)) * scale


def make_refl_loss(pipeline, reward, sampler, config):
    """The loss of one batch of prompts.

    Args:
        config: `config.method`.

    Returns:
        (trainable, frozen, batch, key) -> (loss, metrics). batch: "input_ids" and "negative_ids" from the pipeline's
        `tokenize`, "reward" the reward's tokens. frozen holds "reward" beside the pipeline's frozen networks.
    """
    latent_shape = pipeline.latent_shape(config.height, config.width)

    def loss(trainable, frozen, batch, key):
        params = join(frozen, trainable)
        cond = pipeline.encode_prompts(params, batch["input_ids"])
        guided = config.guidance_scale > 1.0
        negative = pipeline.encode_prompts(params, batch["negative_ids"]) if guided else None
        stop_key, image_key = jax.random.split(key)
        stop = draw_stop(stop_key, batch["input_ids"].shape[0], config.stop_min, config.stop_max)
        images = predict_images(
            pipeline,
            sampler,
            params,
            (cond, negative),
            image_key,
            stop=stop,
            latent_shape=latent_shape,
            guidance_scale=config.guidance_scale,
            rollout_quantization=config.rollout_quantization,
        )
        rewards, terms = apply_terms(reward, params["reward"], images, batch["reward"])
        value = refl_loss(rewards, threshold=config.threshold, scale=config.scale)
        metrics = {"reward": rewards.mean(), "reward_std": rewards.std(), "stop": stop.mean()}
        return value, metrics | {f"reward_{name}": scores.mean() for name, scores in terms.items()}

    return loss
