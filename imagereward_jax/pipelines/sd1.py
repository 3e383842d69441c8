"""Stable Diffusion 1.x, and 2.x, which differs in sizes only: text to image, and image to latents."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.pipelines.base import Batch, Params, TextToImage, override_scheduler


class StableDiffusion1(TextToImage):
    """The parts of a Stable Diffusion 1.x model; see `families.open_pipeline`. Attributes: see `TextToImage`."""

    family = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    components = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    text_encoders = {"text_encoder": "tokenizer"}

    def __init__(
        self,
        configs: Mapping[str, Any],
        scheduler_config: dict[str, Any],
        tokenizers: Mapping[str, Any],
        **options: Any,
    ):
        # As diffusers' StableDiffusionPipeline corrects it in checkpoints where it is absent or different.
        corrected = override_scheduler(scheduler_config, steps_offset=1)
        super().__init__(configs, {"_class_name": "DDIMScheduler"} | corrected, tokenizers, **options)

    def encode_prompts(self, params: Params, ids: dict[str, jax.Array]) -> Batch:
        """Encodes ids to the conditions of the UNet: {"prompt_embeds": [B, L, D]}."""
        encoder = self._network("text_encoder", params)
        return {"prompt_embeds": encoder(jnp.asarray(ids["text_encoder"])).last_hidden_state}

    def predict(self, params: Params, latents: jax.Array, timesteps: jax.Array, cond: Batch) -> jax.Array:
        return self._network("unet", params)(latents, timesteps, cond["prompt_embeds"])

    @classmethod
    def _check_fit(cls, configs):
        unet, text = configs["unet"], configs["text_encoder"]
        if unet.addition_embed_type is not None:
            raise ValueError(
                f"unet: addition_embed_type={unet.addition_embed_type!r} belongs to Stable Diffusion XL, not 1.x or 2.x"
            )
        super()._check_fit(configs)
        if unet.cross_attention_dim != text.hidden_size:
            raise ValueError(
                f"unet: cross_attention_dim={unet.cross_attention_dim} is not the text encoder's "
                f"hidden_size={text.hidden_size}"
            )
