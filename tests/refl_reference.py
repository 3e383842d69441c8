"""The ReFL step in PyTorch with diffusers' networks and schedulers, and a reward that is easy to write twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.refl import Config, draw_stop, make_loss
from imagereward_jax.models.param_tree import join

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PROMPTS = ["a large red circle at the top left", "a small blue cross in the center", "", "two dogs"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class TinyReward:
    """A reward that is easy to write twice: resize, normalise, two linear maps of picture and prompt around a tanh."""

    def __init__(self, size=32, width=8):
        rng = np.random.default_rng(1)
        self.size = size
        pixels = size * size * 3
        self.params = {
            "image": rng.normal(size=(pixels, width)).astype(np.float32) * pixels**-0.5,
            "text": rng.normal(size=(16, width)).astype(np.float32) * 0.01,
        }

    def tokenize(self, prompts):
        rng = np.random.default_rng(2)
        return {"input_ids": rng.integers(0, 100, (len(prompts), 16)).astype(np.int32)}

    def apply(self, params, images, tokens):
        from imagereward_jax.rewards.preprocess import device_pixels

        pixels = device_pixels(images, self.size).reshape(images.shape[0], -1)
        text = tokens["input_ids"].astype(jnp.float32) @ params["text"]
        return jnp.tanh(pixels @ params["image"] + text).sum(-1)

    def in_torch(self, images, tokens):
        """images: NCHW in [0, 1]."""
        images = torch.nn.functional.interpolate(
            images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        )
        mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
        pixels = ((images - mean) / std).permute(0, 2, 3, 1).flatten(1)
        text = torch.from_numpy(tokens["input_ids"]).float() @ torch.from_numpy(self.params["text"])
        return torch.tanh(pixels @ torch.from_numpy(self.params["image"]) + text).sum(-1)


def method_config(**changes):
    """config.method for small images."""
    return Config(**{"num_steps": 6, "stop_min": 2, "stop_max": 5, "height": 16, "width": 16, **changes})


def refl_batch(pipeline, params, reward, prompts=PROMPTS, *, guided=False):
    """What the loss reads of prompts; conditions are made outside of it."""
    encode = jax.jit(pipeline.encode_prompts)
    negative = {"negative_cond": encode(params, pipeline.tokenize([""] * len(prompts)))} if guided else {}
    cond = encode(params, pipeline.tokenize(prompts))
    return {"cond": cond, **negative, "reward": reward.tokenize(prompts)}


def refl_function(pipeline, reward, config, sampler_name):
    """(trainable, frozen, batch, key) -> (loss, metrics), of trees that are joined to the components."""
    loss = make_loss(config, pipeline, reward)
    sampler = make_sampler(sampler_name, pipeline.scheduler_config, config.num_steps)

    def function(trainable, frozen, batch, key):
        return loss(Models(join(frozen, trainable), tables=sampler), batch, key)

    return function


def torch_step(reference, reward, sampler_name, config, tokenize, batch, noise, step_noise, stop):
    """The paper's step sample by sample: (loss, {key: gradient of what trains in the UNet})."""
    kinds = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
    unet, vae, text = reference.unet, reference.vae, reference.text_encoder
    unet.zero_grad()
    prompt_ids, negative_ids = (tokenize(texts)["text_encoder"] for texts in (PROMPTS, [""] * len(PROMPTS)))
    rewards = []
    for row in range(len(stop)):
        scheduler = kinds[sampler_name].from_config(reference.scheduler.config)
        scheduler.set_timesteps(config.num_steps)
        with torch.no_grad():
            embeds = [text(torch.from_numpy(ids[row : row + 1]).long())[0] for ids in (negative_ids, prompt_ids)]

        def denoise(latents, timestep, embeds=embeds):
            if config.guidance_scale == 1.0:
                return unet(latents, timestep, embeds[1]).sample
            negative, positive = (unet(latents, timestep, part).sample for part in embeds)
            return negative + config.guidance_scale * (positive - negative)

        latents = torch.from_numpy(noise[row : row + 1].transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            for step, timestep in enumerate(scheduler.timesteps[: stop[row]]):
                fixed = torch.from_numpy(step_noise[row, step][None].transpose(0, 3, 1, 2).copy())
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, fixed=fixed, **__: fixed
                    )
                    latents = scheduler.step(denoise(latents, timestep), timestep, latents).prev_sample
        timestep = scheduler.timesteps[stop[row]]
        output = denoise(latents, timestep)
        clean = scheduler.step(output, timestep, latents).pred_original_sample
        image = (vae.decode(clean / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        rewards.append(reward.in_torch(image, {"input_ids": batch["reward"]["input_ids"][row : row + 1]}))
    loss = torch.relu(config.threshold - torch.cat(rewards)).mean() * config.scale
    loss.backward()
    return loss.item(), {name: weight.grad.numpy() for name, weight in unet.named_parameters() if weight.requires_grad}


def draws(key, config, latent_shape, batch):
    """(noise [B, h, w, c], step noise [B, steps, h, w, c], stop [B]) that the loss draws from `key`."""
    stop_key, image_key = jax.random.split(key)
    noise_key, sampler_key = jax.random.split(image_key)
    stop = np.asarray(draw_stop(stop_key, batch, config.stop_min, config.stop_max))
    noise = np.asarray(jax.random.normal(noise_key, (batch, *latent_shape)))

    def of_sample(key):
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), latent_shape))(
            jnp.arange(config.num_steps)
        )

    return noise, np.asarray(jax.vmap(of_sample)(jax.random.split(sampler_key, batch))), stop
