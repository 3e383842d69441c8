"""Stable Diffusion XL (arXiv 2307.01952) and SDXL-Turbo: two text encoders; sizes and crop condition the UNet."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from imagereward_jax.pipelines.base import Batch, Params, TextToImage
from imagereward_jax.weights.generation import Generation

TIME_IDS = 6
TURBO = Generation("euler_ancestral", 1, 0.0)


def make_time_ids(original_size: ArrayLike, crop_top_left: ArrayLike, target_size: ArrayLike) -> np.ndarray:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2): float32 [..., 6].

    Args:
        original_size: (height, width) [..., 2] of the image before it was resized.
        crop_top_left: (top, left) [..., 2] of the crop, in the resized image.
        target_size: (height, width) [..., 2] of the crop.
    """
    parts = (original_size, crop_top_left, target_size)
    return np.concatenate([np.asarray(part, np.float32) for part in parts], axis=-1)


class StableDiffusionXL(TextToImage):
    """The parts of an SDXL base model; see `families.open_pipeline`. Attributes: see `TextToImage`.

    A `cond` may hold "time_ids" [B, 6] (`make_time_ids`); without them the UNet is given those of uncropped images of
    the size that is made. If `force_zeros_for_empty_prompt`, empty prompts are all zeros, as in SDXL's training: the
    default negative prompt, and captions that were dropped for guidance.
    """

    family = "sdxl"
    pipeline_class = "StableDiffusionXLPipeline"
    components = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    text_encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    micro_conditioned = True

    def __init__(
        self,
        configs: Mapping[str, Any],
        scheduler_config: dict[str, Any],
        tokenizers: Mapping[str, Any],
        *,
        force_zeros_for_empty_prompt: bool = True,
        **options: Any,
    ):
        scheduler_config = {"_class_name": "EulerDiscreteScheduler"} | scheduler_config
        super().__init__(configs, scheduler_config, tokenizers, **options)
        self.force_zeros_for_empty_prompt = bool(force_zeros_for_empty_prompt)
        self._empty_ids = self.tokenize([""])

    @classmethod
    def default_generation(cls, scheduler_config: dict) -> Generation:
        """Settings of SDXL, or of SDXL-Turbo if the scheduler is Turbo's: ancestral, with trailing timesteps."""
        kind, spacing = (scheduler_config.get(name) for name in ("_class_name", "timestep_spacing"))
        turbo = (kind, spacing) == ("EulerAncestralDiscreteScheduler", "trailing")
        return TURBO if turbo else Generation(guidance_scale=5.0)

    def index_fields(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}

    def encode_prompts(self, params: Params, ids: dict[str, jax.Array]) -> Batch:
        """Encodes ids to the conditions of the UNet.

        Returns:
            {"prompt_embeds": [B, L, D1 + D2], "pooled_prompt_embeds": [B, P]}: the hidden states before the last
            layer of both encoders side by side, and the projected end-of-text state of the second.
        """
        first, second = (self._network(name, params)(jnp.asarray(ids[name])) for name in self.text_encoders)
        cond = {
            "prompt_embeds": jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], -1),
            "pooled_prompt_embeds": second.pooled,
        }
        if not self.force_zeros_for_empty_prompt:
            return cond
        rows = [jnp.all(jnp.asarray(ids[name]) == self._empty_ids[name], axis=1) for name in self.text_encoders]
        empty = functools.reduce(jnp.logical_and, rows)
        return {
            name: jnp.where(empty.reshape(-1, *[1] * (value.ndim - 1)), 0, value).astype(value.dtype)
            for name, value in cond.items()
        }

    def predict(self, params: Params, latents: jax.Array, timesteps: jax.Array, cond: Batch) -> jax.Array:
        time_ids = cond["time_ids"] if "time_ids" in cond else self.whole_image(latents.shape)
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": time_ids}
        return self._network("unet", params)(latents, timesteps, cond["prompt_embeds"], added)

    def whole_image(self, latent_shape: tuple[int, ...]) -> np.ndarray:
        """Time ids [B, 6] of images that were neither resized nor cropped, for latents [B, h, w, c]."""
        size = np.asarray(latent_shape[1:3]) * self.configs["vae"].downsampling
        return np.tile(make_time_ids(size, (0, 0), size), (latent_shape[0], 1))

    @classmethod
    def _check_fit(cls, configs):
        unet, first, second = (configs[name] for name in ("unet", "text_encoder", "text_encoder_2"))
        if unet.addition_embed_type != "text_time":
            raise ValueError(
                f"unet: addition_embed_type={unet.addition_embed_type!r}; Stable Diffusion XL has 'text_time'"
            )
        super()._check_fit(configs)
        width = first.hidden_size + second.hidden_size
        if unet.cross_attention_dim != width:
            raise ValueError(
                f"unet: cross_attention_dim={unet.cross_attention_dim} is not the {width} hidden features of the text "
                f"encoders ({first.hidden_size} + {second.hidden_size})"
            )
        added = second.projection_dim + TIME_IDS * unet.addition_time_embed_dim
        if unet.projection_class_embeddings_input_dim != added:
            raise ValueError(
                f"unet: projection_class_embeddings_input_dim={unet.projection_class_embeddings_input_dim} is not "
                f"{added}: text_encoder_2's projection_dim={second.projection_dim} + {TIME_IDS} time ids of "
                f"addition_time_embed_dim={unet.addition_time_embed_dim} (SDXL's refiner has 5 and is not implemented)"
            )
