"""Stable Diffusion 1.x, and 2.x, which differs in sizes only: text to image, and image to latents.

The networks are kept as structure alone; their weights are an argument of every method, a dict
`{"unet": ..., "vae": ..., "text_encoder": ...}`, so that they can be cast, sharded, trained and frozen by the caller.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.diffusion.schedule import NoiseSchedule
from imagereward_jax.models.clip import CLIPTextConfig, CLIPTextModel
from imagereward_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from imagereward_jax.weights import diffusers, mapping

# As diffusers' StableDiffusionPipeline corrects them in checkpoints where they are absent or different.
SCHEDULER_CORRECTIONS = {"steps_offset": 1, "clip_sample": False}


class StableDiffusion1:
    """The parts of a Stable Diffusion 1.x model; made by `load` or `from_configs`.

    Attributes:
        networks: maps "unet", "vae" and "text_encoder" to an abstract module (structure and shapes only).
        configs: maps the same names to their config dataclasses.
        scheduler_config: the content of scheduler_config.json, from which samplers are made.
        schedule: the `NoiseSchedule` that the model was trained with.
        tokenizer: a `transformers.CLIPTokenizer`.
        default_size: pixels of the square images that it was trained on.
    """

    family = "sd1"

    def __init__(self, configs, scheduler_config, tokenizer_folder, *, dtype=jnp.float32, remat="none"):
        _check_fit(configs)
        self.configs = configs
        self.scheduler_config = {"_class_name": "DDIMScheduler"} | scheduler_config | SCHEDULER_CORRECTIONS
        self.schedule = NoiseSchedule.from_config(self.scheduler_config)
        self.default_size = configs["unet"].sample_size * configs["vae"].downsampling
        self.tokenizer_folder = Path(tokenizer_folder)
        self.tokenizer = load_tokenizer(self.tokenizer_folder)
        self.max_tokens = min(configs["text_encoder"].max_position_embeddings, self.tokenizer.model_max_length)
        if len(self.tokenizer) > configs["text_encoder"].vocab_size:
            raise ValueError(
                f"{tokenizer_folder}: {len(self.tokenizer)} tokens, but the text encoder knows only "
                f"vocab_size={configs['text_encoder'].vocab_size}"
            )
        self._build = {
            "unet": lambda rngs: UNet2DConditionModel(configs["unet"], dtype=dtype, remat=remat, rngs=rngs),
            "vae": lambda rngs: AutoencoderKL(configs["vae"], dtype=dtype, remat=remat, rngs=rngs),
            "text_encoder": lambda rngs: CLIPTextModel(configs["text_encoder"], dtype=dtype, rngs=rngs),
        }
        self.networks = {
            name: mapping.abstract(lambda build=build: build(nnx.Rngs(0))) for name, build in self._build.items()
        }
        self._graphdefs = {name: nnx.split(network)[0] for name, network in self.networks.items()}

    @classmethod
    def load(cls, name_or_path, *, dtype=jnp.float32, remat="none", variant=None):
        """Opens a diffusers folder, a built-in model or one of the hub.

        Args:
            name_or_path: see `weights.hub.resolve_model`.
            dtype: of the arithmetic. remat: what is recomputed for gradients, see `models.remat`.
            variant: which weight files, e.g. "fp16".

        Returns:
            (pipeline, params), params float32 numpy arrays.

        Raises:
            FileNotFoundError, ValueError: naming the file, field or tensors that are absent or do not fit.
        """
        folder = diffusers.resolve_pipeline(name_or_path, variant=variant)
        parts = {
            name: diffusers.load_component(folder, name, variant=variant) for name in ("unet", "vae", "text_encoder")
        }
        pipeline = cls.from_configs(
            *(config for config, _ in parts.values()),
            diffusers.load_scheduler_config(folder),
            folder / "tokenizer",
            dtype=dtype,
            remat=remat,
        )
        params = {
            name: mapping.from_torch(pipeline.networks[name], tensors, what=str(folder / name), dtype=np.float32)
            for name, (_, tensors) in parts.items()
        }
        return pipeline, params

    @classmethod
    def from_configs(cls, unet, vae, text_encoder, scheduler, tokenizer_folder, *, dtype=jnp.float32, remat="none"):
        """A pipeline without weights, from the contents of the config.json files.

        Raises:
            ValueError: naming a field that is not implemented, or parts that do not fit together.
            FileNotFoundError: there is no tokenizer in `tokenizer_folder`.
        """
        configs = {
            "unet": UNet2DConditionConfig.from_dict(unet),
            "vae": AutoencoderKLConfig.from_dict(vae),
            "text_encoder": CLIPTextConfig.from_dict(text_encoder),
        }
        return cls(configs, scheduler, tokenizer_folder, dtype=dtype, remat=remat)

    def init(self, key):
        """Random float32 weights for training from scratch."""
        # Not jitted: initialisers compile once a shape, far sooner than as one program of some hundred random draws.
        keys = jax.random.split(key, len(self._build))
        return {
            name: mapping.params_of(build(nnx.Rngs(params=network_key)))
            for (name, build), network_key in zip(self._build.items(), keys)
        }

    def abstract_params(self):
        """The weights as `jax.ShapeDtypeStruct`."""
        return {name: mapping.params_of(network) for name, network in self.networks.items()}

    def tokenize(self, prompts):
        """Token ids of a list of prompts, int32 [B, L], padded and cut to the text encoder's length."""
        encoded = self.tokenizer(list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True)
        return np.asarray(encoded["input_ids"], np.int32).reshape(-1, self.max_tokens)

    def cut_off(self, prompt):
        """The end of a prompt that `tokenize` leaves out because it is too long; "" if nothing is."""
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return self.tokenizer.decode(ids[self.max_tokens - 2 :]).strip()

    def encode_prompts(self, params, ids):
        """What the UNet is conditioned on: {"prompt_embeds": [B, L, D]} for token ids [B, L]."""
        return {"prompt_embeds": self._network("text_encoder", params)(jnp.asarray(ids)).last_hidden_state}

    def denoise(self, params, latents, timesteps, cond, negative_cond=None, guidance_scale=1.0):
        """The UNet's output, float32 [B, h, w, c].

        Args:
            latents: [B, h, w, c], a sampler's `model_input`.
            timesteps: [B] or one for all.
            cond: from `encode_prompts`.
            negative_cond: the same for negative (or empty) prompts; switches classifier-free guidance on, which runs
                the network once on a batch of 2B.
            guidance_scale: how far to go from the negative prediction towards and past the other; may be traced.
        """
        unet = self._network("unet", params)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), latents.shape[:1])
        if negative_cond is None:
            return unet(latents, timesteps, cond["prompt_embeds"])
        embeds = jnp.concatenate([negative_cond["prompt_embeds"], cond["prompt_embeds"]])
        both = unet(jnp.concatenate([latents] * 2), jnp.concatenate([timesteps] * 2), embeds)
        negative, positive = jnp.split(both, 2)
        return negative + guidance_scale * (positive - negative)

    def decode(self, params, latents):
        """Images float32 [B, H, W, 3], about in [0, 1] and not clipped, from scaled latents."""
        config = self.configs["vae"]
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self._network("vae", params).decode(latents) * 0.5 + 0.5

    def encode(self, params, images, key):
        """Scaled latents float32 [B, h, w, c], sampled, from images [B, H, W, 3] in [0, 1]."""
        config = self.configs["vae"]
        mean, logvar = self._network("vae", params).encode(images * 2.0 - 1.0)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def latent_shape(self, height, width):
        """(h, w, c) of the latents of images of this size; ValueError if the size is not divisible."""
        step = self.configs["vae"].downsampling
        for name, pixels in (("height", height), ("width", width)):
            if pixels < step or pixels % step:
                near = max(step, round(pixels / step) * step)
                raise ValueError(f"{name}={pixels} should be a positive multiple of {step}, for example {near}")
        return height // step, width // step, self.configs["vae"].latent_channels

    def sample(self, params, ids, negative_ids, noise, *, sampler, guidance_scale=1.0, key=None):
        """Images from noise, float32 [B, H, W, 3] in [0, 1]. Pure: jit it outside.

        Args:
            ids: [B, L], tokens of the prompts.
            negative_ids: [B, L], tokens of what to stay away from; None for no guidance.
            noise: standard normal [B, h, w, c].
            sampler: a `diffusion.samplers.Sampler`.
            key: for stochastic samplers: [B] keys, one an image, so that an image does not depend on its batch.
        """
        cond = self.encode_prompts(params, ids)
        negative = None if negative_ids is None else self.encode_prompts(params, negative_ids)

        def denoise(latents, timesteps):
            return self.denoise(params, latents, timesteps, cond, negative, guidance_scale)

        state = rollout(denoise, sampler, noise, key)
        return jnp.clip(self.decode(params, state.latents), 0.0, 1.0)

    def save(self, folder, params, *, overwrite=False):
        """Writes the whole diffusers folder, which `diffusers.StableDiffusionPipeline` opens; whole or not at all.

        Raises:
            FileExistsError: `folder` is there and not empty, and `overwrite` is false.
        """
        components = (
            (name, (self.configs[name].to_dict(), mapping.to_torch(network, params[name])))
            for name, network in self.networks.items()
        )
        diffusers.save_pipeline(
            folder,
            components,
            scheduler_config=self.scheduler_config,
            tokenizers={"tokenizer": self.tokenizer_folder},
            overwrite=overwrite,
        )

    def _network(self, name, params):
        return nnx.merge(self._graphdefs[name], params[name])


def load_tokenizer(folder):
    """The CLIP tokenizer of a checkpoint, from vocab.json and merges.txt or tokenizer.json.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(folder)
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not slow and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer; expected vocab.json and merges.txt, or tokenizer.json")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def _check_fit(configs):
    """Refuses networks that cannot be put together, or belong to another family."""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    if unet.addition_embed_type is not None:
        raise ValueError(
            f"unet: addition_embed_type={unet.addition_embed_type!r} belongs to Stable Diffusion XL, not 1.x or 2.x"
        )
    if not isinstance(unet.sample_size, int):
        raise ValueError(f"unet: sample_size={unet.sample_size!r} should be one number, the side of the latents")
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != vae.latent_channels:
            raise ValueError(
                f"unet: {name}={getattr(unet, name)} is not the VAE's latent_channels={vae.latent_channels}; "
                "models for inpainting or of other families do not fit here"
            )
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"unet: cross_attention_dim={unet.cross_attention_dim} is not the text encoder's "
            f"hidden_size={text.hidden_size}"
        )
