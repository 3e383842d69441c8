"""What the families of latent diffusion models share: weights in and out, guidance, decoding, sampling.

The networks are kept as structure alone; their weights are an argument of every method, a dict
`{"unet": ..., "vae": ..., "text_encoder": ...}`, so that they can be cast, sharded, trained and frozen by the caller.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.diffusion.schedule import NoiseSchedule
from imagereward_jax.models import lora, quantized
from imagereward_jax.weights import components, diffusers, mapping


class TextToImage:
    """The parts of a text-to-image model; a family says how prompts are encoded and what the UNet is told.

    Attributes:
        networks: maps each of `components` to an abstract module (structure and shapes only).
        configs: maps the same names to their config dataclasses.
        scheduler_config: the content of scheduler_config.json, from which samplers are made.
        schedule: the `NoiseSchedule` that the model was trained with.
        tokenizers: a `transformers.CLIPTokenizer` for each text encoder.
        tokenizer_folders: the folders that they were read from, by the names of these folders in a diffusers folder.
        default_size: pixels of the square images that it was trained on.
        max_tokens: length that prompts are padded and cut to.
        vae_dtype: of the VAE's arithmetic, never float16, in which SDXL's overflows.
    """

    family = None
    components = ()
    # Text encoder to the folder of its tokenizer.
    text_encoders = {}
    # Whether the UNet is told the picture's original size and crop (`make_time_ids`).
    micro_conditioned = False

    def __init__(
        self, configs, scheduler_config, tokenizer_folders, *, dtype=jnp.float32, vae_dtype=None, remat="none"
    ):
        self._check_fit(configs)
        self.configs = configs
        self.scheduler_config = scheduler_config
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.default_size = configs["unet"].sample_size * configs["vae"].downsampling
        self.tokenizer_folders = {name: Path(folder) for name, folder in tokenizer_folders.items()}
        self.tokenizers = [self._open_tokenizer(encoder, name) for encoder, name in self.text_encoders.items()]
        self.max_tokens = self._common_length()
        dtype = jnp.dtype(dtype)  # layers compare it: a string would not be equal
        self.vae_dtype = _vae_dtype(dtype, vae_dtype)
        self._build = {
            name: functools.partial(
                components.build_network,
                name,
                configs[name],
                dtype=self.vae_dtype if name == "vae" else dtype,
                remat=remat,
            )
            for name in self.components
        }
        self.networks = {
            name: mapping.abstract(lambda build=build: build(rngs=nnx.Rngs(0))) for name, build in self._build.items()
        }
        self._graphdefs = {name: nnx.split(network)[0] for name, network in self.networks.items()}

    @classmethod
    def load(cls, name_or_path, *, variant=None, prediction_type=None, **options):
        """Opens a diffusers folder, a built-in model or one of the hub.

        Args:
            name_or_path: see `weights.hub.resolve_model`.
            variant: which weight files, e.g. "fp16".
            prediction_type: what the UNet predicts, where the folder's scheduler says otherwise.
            options: dtype: of the arithmetic (default float32). vae_dtype: of the VAE's (default: the same, but
                float32 for float16). remat: what is recomputed for gradients, see `models.remat`.

        Returns:
            (pipeline, params), params float32 numpy arrays.

        Raises:
            FileNotFoundError, ValueError: naming the file, field or tensors that are absent or do not fit.
        """
        folder = diffusers.resolve_pipeline(name_or_path, variant=variant)
        parts = {name: diffusers.load_component(folder, name, variant=variant) for name in cls.components}
        pipeline = cls(
            {name: components.read_settings(name, config) for name, (config, _) in parts.items()},
            override_prediction_type(diffusers.load_scheduler_config(folder), prediction_type),
            {name: folder / name for name in cls.text_encoders.values()},
            **cls.read_index(folder),
            **options,
        )
        params = {
            name: mapping.from_torch(pipeline.networks[name], tensors, what=str(folder / name), dtype=np.float32)
            for name, (_, tensors) in parts.items()
        }
        return pipeline, params

    @classmethod
    def read_index(cls, folder):
        """Arguments for the constructor that a folder's model_index.json holds."""
        return {}

    def index_fields(self):
        """What `save` writes to model_index.json beside the names of the parts."""
        return {}

    def init(self, key):
        """Random float32 weights for training from scratch."""
        # Not jitted: initialisers compile once a shape, far sooner than as one program of some hundred random draws.
        keys = jax.random.split(key, len(self._build))
        return {
            name: mapping.params_of(build(rngs=nnx.Rngs(params=network_key)))
            for (name, build), network_key in zip(self._build.items(), keys)
        }

    def abstract_params(self):
        """The weights as `jax.ShapeDtypeStruct`."""
        return {name: mapping.params_of(network) for name, network in self.networks.items()}

    def add_lora(self, name, targets, **options):
        """Gives the network `name` low-rank parameters, which `params[name]` holds beside the others from then on.

        Args:
            targets, options: as for `models.lora.attach`, which this returns the names of.
        """
        names = lora.attach(self.networks[name], targets, **options)
        self._graphdefs[name] = nnx.split(self.networks[name])[0]
        return names

    def tokenize(self, prompts):
        """Token ids of a list of prompts, padded and cut to `max_tokens`: int32, prompts first."""
        raise NotImplementedError

    def encode_prompts(self, params, ids):
        """What the UNet is conditioned on, a dict of arrays [B, ...], for what `tokenize` gave."""
        raise NotImplementedError

    def _predict(self, params, latents, timesteps, cond):
        """The UNet's output without guidance."""
        raise NotImplementedError

    def cut_off(self, prompt):
        """The end of a prompt that `tokenize` leaves out because it is too long; "" if nothing is."""
        tokenizer = self.tokenizers[0]
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return tokenizer.decode(ids[self.max_tokens - 2 :]).strip()

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
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), latents.shape[:1])
        if negative_cond is None:
            return self._predict(params, latents, timesteps, cond)
        conds = jax.tree.map(lambda *parts: jnp.concatenate(parts), negative_cond, cond)
        both = self._predict(params, jnp.concatenate([latents] * 2), jnp.concatenate([timesteps] * 2), conds)
        negative, positive = jnp.split(both, 2)
        return negative + guidance_scale * (positive - negative)

    def quantized(self, params, kind):
        """`params` for `denoise` without gradient: the UNet's kernels in "int8" or "fp8" (`models.quantized`), or, with
        "none", all as they are."""
        if kind == "none":
            return params
        return {**params, "unet": quantized.quantize(self.networks["unet"], params["unet"], kind)}

    def decode(self, params, latents):
        """Images float32 [B, H, W, 3], about in [0, 1] and not clipped, from scaled latents."""
        config = self.configs["vae"]
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self._network("vae", params).decode(latents) * 0.5 + 0.5

    def encode(self, params, images, key):
        """Scaled latents float32 [B, h, w, c], sampled, from images [B, H, W, 3] in [0, 1]."""
        return self.draw_latents(*self.encode_moments(params, images), key)

    def encode_moments(self, params, images):
        """Mean and log variance, float32 [B, h, w, c], of the latents of images [B, H, W, 3] in [0, 1], not scaled."""
        return self._network("vae", params).encode(images * 2.0 - 1.0)

    def draw_latents(self, mean, logvar, key):
        """Scaled latents [B, h, w, c] drawn from what `encode_moments` gave."""
        config = self.configs["vae"]
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
            ids: from `tokenize`, of the prompts.
            negative_ids: the same of what to stay away from; None for no guidance.
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
        """Writes the whole diffusers folder, which diffusers' pipeline of this family opens; whole or not at all.

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
            tokenizers=self.tokenizer_folders,
            index_fields=self.index_fields(),
            overwrite=overwrite,
        )

    def _network(self, name, params):
        return nnx.merge(self._graphdefs[name], params[name])

    def _open_tokenizer(self, encoder, name):
        """The tokenizer in the folder `name`, checked against its text encoder."""
        folder, vocab_size = self.tokenizer_folders[name], self.configs[encoder].vocab_size
        tokenizer = load_tokenizer(folder)
        if len(tokenizer) > vocab_size:
            raise ValueError(f"{folder}: {len(tokenizer)} tokens, but {encoder} knows only vocab_size={vocab_size}")
        return tokenizer

    def _common_length(self):
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return min([*lengths, *(self.configs[encoder].max_position_embeddings for encoder in self.text_encoders)])

    @classmethod
    def _check_fit(cls, configs):
        """Refuses networks that cannot be put together, or belong to another family."""
        unet, vae = configs["unet"], configs["vae"]
        if not isinstance(unet.sample_size, int):
            raise ValueError(f"unet: sample_size={unet.sample_size!r} should be one number, the side of the latents")
        for name in ("in_channels", "out_channels"):
            if getattr(unet, name) != vae.latent_channels:
                raise ValueError(
                    f"unet: {name}={getattr(unet, name)} is not the VAE's latent_channels={vae.latent_channels}; "
                    "models for inpainting or of other families do not fit here"
                )


def make_time_ids(original_size, crop_top_left, target_size):
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): float32 [..., 6].

    Args:
        original_size: (height, width) [..., 2] of the picture before it was resized.
        crop_top_left: (top, left) [..., 2] of the crop, in the resized picture.
        target_size: (height, width) [..., 2] of the crop.
    """
    parts = (original_size, crop_top_left, target_size)
    return np.concatenate([np.asarray(part, np.float32) for part in parts], axis=-1)


def override_prediction_type(scheduler_config, prediction_type):
    """The scheduler's settings with `prediction_type`, or as they are for None."""
    if prediction_type is None:
        return scheduler_config
    defaulted = [name for name in scheduler_config.get("_use_default_values", ()) if name != "prediction_type"]
    return scheduler_config | {"prediction_type": prediction_type, "_use_default_values": defaulted}


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


def encode_ids(tokenizer, prompts, length):
    """Token ids int32 [B, length] of a list of prompts, padded and cut."""
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.asarray(encoded["input_ids"], np.int32).reshape(-1, length)


def _vae_dtype(dtype, vae_dtype):
    """What the VAE computes in; ValueError if float16 is asked for, in which SDXL's overflows."""
    if vae_dtype is None:
        return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)
    if jnp.dtype(vae_dtype) == jnp.float16:
        raise ValueError("vae_dtype=float16: the VAE overflows in it; choose bfloat16 or float32")
    return jnp.dtype(vae_dtype)
