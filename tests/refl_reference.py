"""Reward gradients in PyTorch with diffusers' networks and schedulers, and a reward that is easy to write twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.methods.base import Models
from imagereward_jax.methods.refl import Config, make_loss
from imagereward_jax.methods.reward_tuning import draw_stop
from imagereward_jax.models.param_tree import join

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")

PROMPTS = ["a large red circle at the top left", "a small blue cross in the center", "", "two dogs"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def saved_pair(folder):
    """(pipeline, params, diffusers' pipeline with the same weights), of a one-level model that is saved in `folder`."""
    pipeline, params = tiny_sd1.make_one_level(folder / "tokenizer")
    pipeline.save(folder / "saved", params)
    return pipeline, params, diffusers.StableDiffusionPipeline.from_pretrained(folder / "saved", safety_checker=None)


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


def refl_function(pipeline, reward, config, sampler_name, make_loss=make_loss, reference=None):
    """(trainable, frozen, batch, key) -> (loss, metrics), of trees that are joined to the components."""
    loss = make_loss(config, pipeline, reward)
    sampler = make_sampler(sampler_name, pipeline.scheduler_config, config.num_steps, config.eta)

    def function(trainable, frozen, batch, key):
        return loss(Models(join(frozen, trainable), reference, tables=sampler), batch, key)

    return function


class TorchSampler:
    """One sample's rollout as the papers write it, with gradient in the chosen steps.

    Args:
        reference: diffusers' pipeline. embeds: of the negative prompt and the prompt.
        base: the UNet that `deviations` compares with at each step that carries gradient.
    """

    def __init__(self, reference, sampler_name, config, embeds, *, base=None):
        kinds = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}
        self.scheduler = kinds[sampler_name].from_config(reference.scheduler.config)
        self.scheduler.set_timesteps(config.num_steps)
        # In float64: the terms of the last step's gradient nearly cancel, which costs float32 tables digits.
        self.scheduler.alphas_cumprod = torch.cumprod(1 - self.scheduler.betas.double(), 0)
        self.scheduler.final_alpha_cumprod = self.scheduler.alphas_cumprod[0]
        self.unet, self.base, self.deviations = reference.unet, base, []
        self.embeds, self.config = embeds, config

    def denoise(self, unet, latents, timestep):
        negative, positive = self.embeds
        output = unet(latents, timestep, positive).sample
        if self.config.guidance_scale <= 1.0:
            return output
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.negative_gradient):
            negative = unet(latents, timestep, negative).sample
        guided = negative + self.config.guidance_scale * (output - negative)
        return output + (guided - output).detach() if self.config.unit_gradient else guided

    def output(self, latents, timestep, carries):
        with torch.set_grad_enabled(carries):
            output = self.denoise(self.unet, latents, timestep)
        if carries and self.base:
            with torch.no_grad():
                base = self.denoise(self.base, latents, timestep)
            self.deviations.append((output - base).square().mean())
        return output

    def step(self, output, timestep, latents, fixed):
        if isinstance(self.scheduler, diffusers.DDIMScheduler):
            return self.scheduler.step(output, timestep, latents, eta=self.config.eta, variance_noise=fixed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: fixed)
            return self.scheduler.step(output, timestep, latents)

    def clean(self, noise, step_noise, stop, carries, *, through_input=True):
        """The latents after the last step, or those predicted at `stop` if it is before it.

        Args:
            noise: [h, w, c]. step_noise: [S, h, w, c]. carries: step -> whether it carries gradient.
        """
        latents = nchw(noise[None])
        for step, timestep in enumerate(self.scheduler.timesteps):
            output = self.output(latents if through_input else latents.detach(), timestep, carries(step))
            done = self.step(output, timestep, latents, nchw(step_noise[step][None]))
            if step == stop:
                return done.pred_original_sample
            latents = done.prev_sample
        return latents

    def noised_copy(self, clean, noise):
        """The clean latents predicted from `clean` noised to the last step (DRaFT-LV)."""
        timestep = self.scheduler.timesteps[-1:]
        noised = self.scheduler.add_noise(clean.detach(), nchw(noise[None]), timestep)
        output = self.denoise(self.unet, noised, timestep[0])
        return self.step(output, timestep[0], noised, torch.zeros_like(noised)).pred_original_sample


def nchw(latents):
    return torch.from_numpy(np.asarray(latents).transpose(0, 3, 1, 2).copy())


def torch_embeds(reference, tokenize, prompts):
    """For each prompt, the embeddings of the empty prompt and of its own."""
    ids = [torch.from_numpy(tokenize(texts)["text_encoder"]).long() for texts in ([""] * len(prompts), prompts)]
    with torch.no_grad():
        negative, positive = (reference.text_encoder(one)[0] for one in ids)
    return [(negative[row : row + 1], positive[row : row + 1]) for row in range(len(prompts))]


def torch_reward(reference, reward, clean, batch, row):
    """The reward [1] of decoded clean latents."""
    image = (reference.vae.decode(clean / reference.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    return reward.in_torch(image, {"input_ids": batch["reward"]["input_ids"][row : row + 1]})


def unet_gradients(reference):
    """{key: gradient of what trains in the UNet}, set to zero for the next time."""
    weights = {name: weight for name, weight in reference.unet.named_parameters() if weight.requires_grad}
    gradients = {name: weight.grad.numpy().copy() for name, weight in weights.items()}
    reference.unet.zero_grad()
    return gradients


def torch_step(reference, reward, sampler_name, config, tokenize, batch, noise, step_noise, stop):
    """ReFL's step sample by sample: (loss, {key: gradient of what trains in the UNet})."""
    rewards = []
    for row, embeds in enumerate(torch_embeds(reference, tokenize, PROMPTS)):
        sampler = TorchSampler(reference, sampler_name, config, embeds)
        clean = sampler.clean(noise[row], step_noise[row], stop[row], {int(stop[row])}.__contains__)
        rewards.append(torch_reward(reference, reward, clean, batch, row))
    loss = torch.relu(config.threshold - torch.cat(rewards)).mean() * config.scale
    loss.backward()
    return loss.item(), unet_gradients(reference)


def draws(key, config, latent_shape, batch):
    """(noise [B, h, w, c], step noise [B, steps, h, w, c], stop [B]) that the loss draws from `key`."""
    stop_key, image_key = jax.random.split(key)
    noise_key, sampler_key = jax.random.split(image_key)
    stop = np.asarray(draw_stop(stop_key, batch, config.stop_min, config.stop_max))
    noise = np.asarray(jax.random.normal(noise_key, (batch, *latent_shape)))
    return noise, draw_step_noise(sampler_key, batch, config.num_steps, latent_shape), stop


def draw_step_noise(key, batch, num_steps, latent_shape):
    """[B, steps, h, w, c], as a rollout draws it."""

    def of_sample(key):
        return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), latent_shape))(jnp.arange(num_steps))

    return np.asarray(jax.vmap(of_sample)(jax.random.split(key, batch)))
