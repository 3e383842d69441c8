"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer that follows a flow, and three text encoders."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imagereward_jax.diffusion.flow import CLASSES, is_flow
from imagereward_jax.pipelines.base import Batch, Params, TextToImage
from imagereward_jax.pipelines.sd3_prompts import join_text
from imagereward_jax.weights.generation import Generation

T5 = "text_encoder_3"
T5_TOKENS = 256  # diffusers' default
LONGEST_T5 = 512


class StableDiffusion3(TextToImage):
    """The parts of a Stable Diffusion 3 or 3.5 model; see `families.open_pipeline`. Attributes: see `TextToImage`.

    The third text encoder, T5, may be left out: zeros take the place of its output. Empty prompts are encoded like any
    other. Skip-layer guidance is not part of `denoise`.

    Args:
        max_sequence_length: tokens of T5's prompts, or zeros in their place, 1 to 512. None: as many as its tokenizer
            takes, and no more than 256.

    Raises:
        ValueError: beside the reasons of `TextToImage`: the scheduler is not of a flow, or `max_sequence_length` is out
            of range.
    """

    family = "sd3"
    pipeline_class = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    components = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        T5: "T5EncoderModel",
    }
    text_encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", T5: "tokenizer_3"}
    optional = frozenset({T5})
    # As diffusers' trainers: not the second attention, attn2, of 3.5-medium.
    lora_targets = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"

    def __init__(
        self,
        configs: Mapping[str, Any],
        scheduler_config: dict[str, Any],
        tokenizers: Mapping[str, Any],
        *,
        max_sequence_length: int | None = None,
        **options: Any,
    ):
        scheduler_config = {"_class_name": CLASSES[0]} | scheduler_config
        if not is_flow(scheduler_config):
            raise ValueError(
                f"scheduler_config.json: _class_name={scheduler_config['_class_name']!r} is not of a flow, which "
                f"{self.pipeline_class} follows; expected {CLASSES[0]}"
            )
        if max_sequence_length is not None and not 1 <= max_sequence_length <= LONGEST_T5:
            raise ValueError(f"max_sequence_length={max_sequence_length} should be 1 to {LONGEST_T5}")
        self.max_sequence_length = max_sequence_length
        super().__init__(configs, scheduler_config, tokenizers, **options)

    @classmethod
    def default_generation(cls, scheduler_config: dict) -> Generation:
        """Steps and guidance of diffusers' pipeline. No file tells large-turbo (4 steps, unguided) apart."""
        return Generation("euler", 28, 7.0)

    def encode_prompts(self, params: Params, ids: dict[str, jax.Array]) -> Batch:
        """Encodes ids to the conditions of the transformer.

        Returns:
            {"prompt_embeds": [B, L + max_sequence_length, D], "pooled_prompt_embeds": [B, P1 + P2]}, see `join_text`.
        """
        outputs = {name: self._network(name, params)(jnp.asarray(ids[name])) for name in self.text_encoders}
        return join_text(
            outputs["text_encoder"],
            outputs["text_encoder_2"],
            outputs.get(T5),
            third_length=self.max_sequence_length,
            width=self.configs[self.denoiser].joint_attention_dim,
        )

    def predict(self, params: Params, latents: jax.Array, timesteps: jax.Array, cond: Batch) -> jax.Array:
        """Computes the velocity, noise minus latents, float32 [B, h, w, c]; timesteps: 1000 * sigma [B]."""
        network = self._network(self.denoiser, params)
        return network(latents, timesteps, cond["prompt_embeds"], cond["pooled_prompt_embeds"])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) of the latents of images of this size; ValueError if it is not divisible, or too large for the
        position table."""
        shape = super().latent_shape(height, width)
        most = self.configs[self.denoiser].pos_embed_max_size * self._patch * self.configs["vae"].downsampling
        for name, pixels in (("height", height), ("width", width)):
            if pixels > most:
                raise ValueError(f"{name}={pixels} should be at most {most}: the transformer has no positions beyond")
        return shape

    def _find_prompt_lengths(self):
        if self.max_sequence_length is None:
            takes = self.tokenizers[T5].model_max_length if T5 in self.tokenizers else T5_TOKENS
            self.max_sequence_length = min(T5_TOKENS, takes)
        own = {T5: self.max_sequence_length} if T5 in self.text_encoders else {}
        return super()._find_prompt_lengths() | own

    @classmethod
    def _check_fit(cls, configs):
        super()._check_fit(configs)
        transformer, first, second = (configs[name] for name in ("transformer", "text_encoder", "text_encoder_2"))
        width = transformer.joint_attention_dim
        if first.hidden_size + second.hidden_size > width:
            raise ValueError(
                f"transformer: joint_attention_dim={width} is less than the {first.hidden_size + second.hidden_size} "
                f"hidden features of the CLIP encoders ({first.hidden_size} + {second.hidden_size})"
            )
        if T5 in configs and configs[T5].d_model != width:
            raise ValueError(f"transformer: joint_attention_dim={width} is not {T5}'s d_model={configs[T5].d_model}")
        pooled = first.projection_dim + second.projection_dim
        if transformer.pooled_projection_dim != pooled:
            raise ValueError(
                f"transformer: pooled_projection_dim={transformer.pooled_projection_dim} is not the {pooled} features "
                f"that the CLIP encoders project to ({first.projection_dim} + {second.projection_dim})"
            )
