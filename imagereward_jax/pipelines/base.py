"""Base of the families of latent diffusion models: prompts, guidance, decoding, sampling, export."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from imagereward_jax.diffusion.flow import FlowSchedule, read_schedule
from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.diffusion.sampler import Sampler
from imagereward_jax.diffusion.samplers import check_scheduler_config, make_sampler
from imagereward_jax.models import lora, quantized
from imagereward_jax.pipelines import prompt_ids
from imagereward_jax.pipelines.blend import Blend, blended_denoiser
from imagereward_jax.pipelines.networks import Networks, Params
from imagereward_jax.storage.folders import refuse_existing
from imagereward_jax.weights import components, diffusers, mapping
from imagereward_jax.weights.generation import Generation, distilled_generation
from imagereward_jax.weights.sources import Source

Batch = dict[str, Any]


class TextToImage(Networks):
    """The parts of a text-to-image model; a family says how prompts are encoded and what the denoiser is told.

    Attributes, beside those of `Networks`:
        scheduler_config: the content of scheduler_config.json, from which samplers are made.
        schedule: the `NoiseSchedule` or `FlowSchedule` that the model was trained with.
        tokenizers: the tokenizer of each text encoder, by the encoder's name.
        tokenizer_folders: the folders that the tokenizers were read from, by their names in a diffusers folder.
        generation: sampler, steps and guidance that suit the model.
        default_size: side in pixels of the square images that it was trained on.
        prompt_lengths: length that prompts are padded and cut to, by text encoder.
        components, text_encoders: the family's without those of `optional` that the model lacks.
    """

    family: str
    pipeline_class: str
    denoiser = "unet"
    # Text encoder to the folder of its tokenizer.
    text_encoders: Mapping[str, str]
    # Components that a model of the family may lack.
    optional: frozenset[str] = frozenset()
    # Text encoders that stay as they are when a method trains the others.
    untrained: frozenset[str] = frozenset()
    # Whether the denoiser is conditioned on original size and crop (`sdxl.make_time_ids`).
    micro_conditioned = False
    lora_targets = lora.ATTENTION
    # Layers that `quantized` leaves as they are.
    kept_precise = quantized.KEPT_OF_UNET
    # Words of `embeddings.with_embeddings`, each with its number of vectors by text encoder.
    embedded: Mapping[str, Mapping[str, int]] = {}

    def __init__(
        self,
        configs: Mapping[str, Any],
        scheduler_config: dict[str, Any],
        tokenizers: Mapping[str, Any],
        *,
        generation: Generation | None = None,
        source: Source | None = None,
        dtype: DTypeLike = jnp.float32,
        vae_dtype: DTypeLike | None = None,
        remat: str = "none",
    ):
        self._check_fit(configs)
        self.components = {name: kind for name, kind in self.components.items() if name in configs}
        self.text_encoders = {name: folder for name, folder in self.text_encoders.items() if name in configs}
        super().__init__(configs, source=source, dtype=dtype, vae_dtype=vae_dtype, remat=remat)
        self.schedule = read_schedule(scheduler_config)
        check_scheduler_config(scheduler_config)
        # Exports say so too: diffusers clips by default, and corrects only Stable Diffusion 1.x. It never clips flows.
        clip_sample = None if isinstance(self.schedule, FlowSchedule) else False
        self.scheduler_config = override_scheduler(scheduler_config, clip_sample=clip_sample)
        distilled = distilled_generation(scheduler_config.get("_class_name"))
        self.generation = generation or distilled or self.default_generation(scheduler_config)
        self.default_size = configs[self.denoiser].sample_size * configs["vae"].downsampling
        self.tokenizer_folders = {
            name: Path(tokenizers[name]) for name in self.text_encoders.values() if prompt_ids.is_path(tokenizers[name])
        }
        self.tokenizers = {
            encoder: prompt_ids.open_tokenizer(
                tokenizers[name], encoder, configs[encoder].vocab_size, self.components[encoder]
            )
            for encoder, name in self.text_encoders.items()
        }
        self.prompt_lengths = self._find_prompt_lengths()

    @classmethod
    def from_configs(
        cls, configs: Mapping[str, dict], scheduler: dict, tokenizers: Any, **options: Any
    ) -> "TextToImage":
        """Makes a pipeline from the contents of its files.

        Args:
            configs: config.json by component.
            scheduler: scheduler_config.json.
            tokenizers: by the name of its folder in a diffusers folder, a folder to read or a tokenizer; or a single
                one that serves all text encoders.
            options: `generation`, `source`, settings of the family, and: dtype, of the arithmetic (default float32);
                vae_dtype, of the VAE's (default: the same, but float32 for float16); remat, see `models.remat`.

        Raises:
            ValueError: naming a field that is not implemented, or parts that do not fit together.
            FileNotFoundError: there is no tokenizer in one of the folders.
        """
        settings = {
            name: components.read_settings(cls.components[name], config, f"{name}/config.json")
            for name, config in configs.items()
        }
        if not isinstance(tokenizers, Mapping):
            tokenizers = dict.fromkeys(cls.text_encoders.values(), tokenizers)
        return cls(settings, scheduler, tokenizers, **options)

    @property
    def trained_encoders(self) -> tuple[str, ...]:
        """The text encoders that a method may train."""
        return tuple(name for name in self.text_encoders if name not in self.untrained)

    @property
    def max_tokens(self) -> int:
        """The longest of `prompt_lengths`; no encoder reads tokens beyond it."""
        return max(self.prompt_lengths.values())

    def _find_prompt_lengths(self) -> dict[str, int]:
        """`prompt_lengths` of encoders with a table of positions; ValueError if they differ."""
        lengths = {
            encoder: min(tokenizer.model_max_length, self.configs[encoder].max_position_embeddings)
            for encoder, tokenizer in self.tokenizers.items()
            if hasattr(self.configs[encoder], "max_position_embeddings")
        }
        length = prompt_ids.common_length({self.text_encoders[name]: length for name, length in lengths.items()})
        return dict.fromkeys(lengths, length)

    @classmethod
    def default_generation(cls, scheduler_config: dict) -> Generation:
        """Sampler, steps and guidance of a model whose files state none."""
        return Generation()

    def index_fields(self) -> dict[str, Any]:
        """The settings that `save` writes to model_index.json beside the names of the parts."""
        return {}

    def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids of prompts by text encoder, each int32 [B, L], padded and cut to `prompt_lengths`."""
        return {
            encoder: prompt_ids.encode(tokenizer, prompts, self.prompt_lengths[encoder])
            for encoder, tokenizer in self.tokenizers.items()
        }

    def encode_prompts(self, params: Params, ids: dict[str, jax.Array]) -> Batch:
        """Encodes the ids that `tokenize` gave to the denoiser's conditions, a dict of arrays [B, ...]."""
        raise NotImplementedError

    def predict(self, params: Params, latents: jax.Array, timesteps: jax.Array, cond: Batch) -> jax.Array:
        """Computes the denoiser's output [B, h, w, c] without guidance; timesteps: [B]."""
        raise NotImplementedError

    def rows(self, cond: Batch) -> int:
        """Number of prompts that these conditions, from `encode_prompts`, belong to."""
        return jax.tree.leaves(cond)[0].shape[0]

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that `tokenize` cuts off for every text encoder as too long; "" if it fits."""
        encoder = max(self.prompt_lengths, key=self.prompt_lengths.get)
        return prompt_ids.cut_off(self.tokenizers[encoder], prompt, self.prompt_lengths[encoder])

    def denoise(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: ArrayLike,
        cond: Batch,
        negative_cond: Batch | None = None,
        guidance_scale: ArrayLike = 1.0,
    ) -> jax.Array:
        """Computes the denoiser's output, float32 [B, h, w, c], with guidance if `negative_cond` is given.

        Args:
            latents: [B, h, w, c], a sampler's `model_input`.
            timesteps: [B] or one for all.
            cond: from `encode_prompts`.
            negative_cond: the same for negative (or empty) prompts. It switches on classifier-free guidance, which
                runs the network once on a batch of 2B.
            guidance_scale: factor on the step from the negative prediction to the other; may be traced, also one
                per row, [B, 1, 1, 1].
        """
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), latents.shape[:1])
        if negative_cond is None:
            return self.predict(params, latents, timesteps, cond)
        both = self.predict_each(params, latents, timesteps, [negative_cond, cond])
        return self.guided(*both, guidance_scale)

    def predict_each(
        self, params: Params, latents: jax.Array, timesteps: jax.Array, conds: Sequence[Batch]
    ) -> list[jax.Array]:
        """`predict` for each of `conds` at the same latents, in one call on a batch of len(conds) * B."""
        stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conds)
        latents, timesteps = (jnp.concatenate([rows] * len(conds)) for rows in (latents, timesteps))
        return jnp.split(self.predict(params, latents, timesteps, stacked), len(conds))

    @staticmethod
    def guided(negative: jax.Array, positive: jax.Array, guidance_scale: ArrayLike) -> jax.Array:
        """Classifier-free guidance (arXiv 2207.12598), from the predictions for negative prompts and prompts."""
        return negative + guidance_scale * (positive - negative)

    def denoiser_for(
        self,
        cond: Batch,
        negative_cond: Batch | None = None,
        guidance_scale: ArrayLike = 1.0,
        *,
        negative_gradient: bool = True,
        unit_gradient: bool = False,
    ) -> Callable[..., jax.Array]:
        """Binds `denoise` to conditions: (params, latents, timesteps, step) -> output, as `rollout` calls it.

        Latents may be k times as many as the conditions, each of which then serves k consecutive rows.

        Args:
            negative_gradient: False stops the gradient of the negative prediction, which is then a call of its own.
            unit_gradient: with negative_gradient=False, gives the guided output the gradient of the positive
                prediction, not `guidance_scale` times that.
        """

        def denoise(params, latents, timesteps, step):
            copies = latents.shape[0] // self.rows(cond)
            given = (cond, negative_cond, guidance_scale)
            if copies > 1:
                given = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0) if jnp.ndim(x) else x, given)
            positive_rows, negative_rows, guidance = given
            if negative_gradient or negative_cond is None:
                return self.denoise(params, latents, timesteps, positive_rows, negative_rows, guidance)
            constant = jax.lax.stop_gradient((params, latents))
            negative = jax.lax.stop_gradient(self.denoise(*constant, timesteps, negative_rows))
            positive = self.denoise(params, latents, timesteps, positive_rows)
            output = self.guided(negative, positive, guidance)
            return positive + jax.lax.stop_gradient(output - positive) if unit_gradient else output

        return denoise

    def quantized(self, params: Params, kind: str) -> Params:
        """Quantises the denoiser's kernels to "int8" or "fp8" (`models.quantized`) for `denoise` without gradient;
        "none" returns `params`."""
        if kind == "none":
            return params
        name = self.denoiser
        return {**params, name: quantized.quantize(self.networks[name], params[name], kind, self.kept_precise)}

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Decodes scaled latents to images float32 [B, H, W, 3], about in [0, 1] and not clipped."""
        config = self.configs["vae"]
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return self._network("vae", params).decode(latents) * 0.5 + 0.5

    def encode(self, params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
        """Encodes images [B, H, W, 3] in [0, 1] to sampled, scaled latents float32 [B, h, w, c]."""
        return self.draw_latents(*self.encode_moments(params, images), key)

    def encode_moments(self, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance, float32 [B, h, w, c], of the latents of images [B, H, W, 3] in [0, 1], not scaled."""
        return self._network("vae", params).encode(images * 2.0 - 1.0)

    def draw_latents(self, mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
        """Draws scaled latents [B, h, w, c] from the moments that `encode_moments` gave."""
        return self.scale_latents(mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape))

    def scale_latents(self, latents: jax.Array) -> jax.Array:
        """Scales latents of the VAE to those that the denoiser reads."""
        config = self.configs["vae"]
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def make_sampler(self, name: str, num_steps: int, eta: float, height: int, width: int) -> Sampler:
        """`diffusion.samplers.make_sampler` of the model's schedule, for images of this size in pixels."""
        tokens = self.image_tokens(self.latent_shape(height, width))
        return make_sampler(name, self.scheduler_config, num_steps, eta, image_tokens=tokens)

    def image_tokens(self, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of latents [h, w, c] in the denoiser's sequence: its patches, or every position if it has none."""
        return (latent_shape[0] // self._patch) * (latent_shape[1] // self._patch)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of this size; ValueError if the size is not divisible."""
        scale = self.configs["vae"].downsampling
        step = scale * self._patch
        for name, pixels in (("height", height), ("width", width)):
            if pixels < step or pixels % step:
                near = max(step, round(pixels / step) * step)
                raise ValueError(f"{name}={pixels} should be a positive multiple of {step}, for example {near}")
        return height // scale, width // scale, self.configs["vae"].latent_channels

    @property
    def _patch(self):
        """Side of the denoiser's patches in latents; 1 if it has none."""
        return getattr(self.configs[self.denoiser], "patch_size", 1)

    def sample(
        self,
        params: Params,
        cond: Batch,
        negative_cond: Batch | None,
        noise: jax.Array,
        *,
        sampler: Sampler,
        guidance_scale: ArrayLike = 1.0,
        key: jax.Array | None = None,
        blend: Blend | None = None,
        base: Params | None = None,
    ) -> jax.Array:
        """Samples images float32 [B, H, W, 3] in [0, 1] from noise. Pure: jit it outside.

        Args:
            cond: from `encode_prompts`, or ids from `tokenize`, which are encoded here.
            negative_cond: the same of negative prompts; None for no guidance.
            noise: standard normal [B, h, w, c].
            sampler: a `diffusion.sampler.Sampler`.
            key: for stochastic samplers: [B] keys, one per image, so that an image does not depend on its batch.
            blend: how `params`, a tuned model, shares the steps with `base`; None for `params` alone.
            base: of `blend`, the components in which the base model differs from `params`: the denoiser, and text
                encoders if they were tuned.
        """
        given = [cond] if negative_cond is None else [negative_cond, cond]
        conds = [self._encoded(params, one) for one in given]
        if blend is None:
            denoise, weights = self.denoiser_for(conds[-1], conds[0] if conds[1:] else None, guidance_scale), params
        else:
            weights = ({**params, **base}, params)
            own = any(name in base for name in self.text_encoders)
            base_conds = [self._encoded(weights[0], one) for one in given] if own else conds
            denoise = blended_denoiser(self, blend, (base_conds, conds), guidance_scale)
        latents = rollout(denoise, sampler, noise, key, params=weights).state.latents
        return jnp.clip(self.decode(params, latents), 0.0, 1.0)

    def _encoded(self, params, given):
        """Conditions, from conditions or ids by encoder."""
        return self.encode_prompts(params, given) if set(given) == set(self.tokenizers) else given

    def save(
        self,
        folder: str | Path,
        params: Params,
        *,
        overwrite: bool = False,
        generation: Generation | None = None,
    ) -> None:
        """Writes a diffusers folder, which diffusers' pipeline of this class opens; whole or not at all.

        One component at a time is in memory. If there are several processes, all have to call this; the first writes.

        Args:
            params: by component; arrays may be sharded. Components that are left out are copied, to the bit, from the
                files that the pipeline was opened from.
            generation: sampler, steps and guidance to state; None for the pipeline's own.

        Raises:
            FileExistsError: `folder` is there and not empty, and `overwrite` is false.
            ValueError: a component is neither in `params` nor in files, or the pipeline has embeddings.
        """
        if self.embedded:
            raise ValueError(
                f"a pipeline with the embeddings {', '.join(self.embedded)} is for sampling; save the one without them"
            )
        if set(params) < set(self.components):
            self._files()
        if jax.process_index():
            for name in params:
                mapping.to_torch(self.networks[name], params[name])  # gathers what the first process writes
            return
        refuse_existing(folder, overwrite=overwrite, marker=diffusers.INDEX)
        order = [*params, *(name for name in self.components if name not in params)]
        diffusers.save_pipeline(
            folder,
            ((name, (self.component_config(name), self._tensors(name, params))) for name in order),
            pipeline_class=self.pipeline_class,
            scheduler_config=self.scheduler_config,
            tokenizers=self.tokenizer_folders,
            fields=self.index_fields(),
            generation=generation or self.generation,
            overwrite=overwrite,
        )

    @classmethod
    def _check_fit(cls, configs):
        """Refuses networks that cannot be put together, or belong to another family."""
        denoiser, vae = configs[cls.denoiser], configs["vae"]
        if not isinstance(denoiser.sample_size, int):
            raise ValueError(
                f"{cls.denoiser}: sample_size={denoiser.sample_size!r} should be one number, the side of the latents"
            )
        for name in ("in_channels", "out_channels"):
            if getattr(denoiser, name) != vae.latent_channels:
                raise ValueError(
                    f"{cls.denoiser}: {name}={getattr(denoiser, name)} is not the VAE's latent_channels="
                    f"{vae.latent_channels}; models for inpainting or of other families do not fit here"
                )


def override_scheduler(scheduler_config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The scheduler's settings with these fields stated; None leaves a field as it is."""
    fields = {name: value for name, value in fields.items() if value is not None}
    overridden = scheduler_config | fields
    # diffusers passes over the fields that are listed as defaults.
    if noted := scheduler_config.get("_use_default_values"):
        overridden["_use_default_values"] = [name for name in noted if name not in fields]
    return overridden
