"""Stable Diffusion XL (arXiv 2307.01952) and SDXL-Turbo: two text encoders, and a UNet that is told sizes and crop."""

import jax.numpy as jnp
import numpy as np

from imagereward_jax.pipelines.base import TextToImage, encode_ids, make_time_ids
from imagereward_jax.weights import components, diffusers

TIME_IDS = 6


class StableDiffusionXL(TextToImage):
    """The parts of an SDXL base model; made by `load` or `from_configs`. Attributes: see `TextToImage`.

    A `cond` may hold "time_ids" [B, 6] (`make_time_ids`); without, the UNet is told of whole pictures of the size that
    is made. Empty prompts are all zeros if `force_zeros_for_empty_prompt` (as in SDXL's training): the default
    negative prompt, and captions that were dropped for guidance.
    """

    family = "sdxl"
    components = ("unet", "vae", "text_encoder", "text_encoder_2")
    text_encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    micro_conditioned = True

    def __init__(self, configs, scheduler_config, tokenizer_folders, *, force_zeros_for_empty_prompt=True, **options):
        scheduler_config = {"_class_name": "EulerDiscreteScheduler"} | scheduler_config
        super().__init__(configs, scheduler_config, tokenizer_folders, **options)
        self.force_zeros_for_empty_prompt = bool(force_zeros_for_empty_prompt)
        self._empty_ids = self.tokenize([""])

    @classmethod
    def from_configs(
        cls,
        unet,
        vae,
        text_encoder,
        text_encoder_2,
        scheduler,
        tokenizer_folder,
        tokenizer_2_folder,
        **options,
    ):
        """A pipeline without weights, from the contents of the config.json files.

        Args:
            options: force_zeros_for_empty_prompt, and dtype, vae_dtype and remat as for `load`.

        Raises:
            ValueError: naming a field that is not implemented, or parts that do not fit together.
            FileNotFoundError: there is no tokenizer in one of the folders.
        """
        given = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        configs = {name: components.read_settings(name, config) for name, config in given.items()}
        folders = {"tokenizer": tokenizer_folder, "tokenizer_2": tokenizer_2_folder}
        return cls(configs, scheduler, folders, **options)

    @classmethod
    def read_index(cls, folder):
        return diffusers.load_index_fields(folder)

    def index_fields(self):
        return {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt}

    def tokenize(self, prompts):
        """Token ids of a list of prompts, int32 [B, 2, L]: one row for each text encoder, which pad differently."""
        return np.stack([encode_ids(tokenizer, prompts, self.max_tokens) for tokenizer in self.tokenizers], axis=1)

    def encode_prompts(self, params, ids):
        """What the UNet is conditioned on, for token ids [B, 2, L].

        Returns:
            {"prompt_embeds": [B, L, D1 + D2], "pooled_prompt_embeds": [B, P]}: the hidden states before the last
            layer of both encoders side by side, and the projected end-of-text state of the second.
        """
        ids = jnp.asarray(ids)
        first, second = (self._network(name, params)(ids[:, i]) for i, name in enumerate(self.text_encoders))
        cond = {
            "prompt_embeds": jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], -1),
            "pooled_prompt_embeds": second.pooled,
        }
        if not self.force_zeros_for_empty_prompt:
            return cond
        empty = jnp.all(ids == self._empty_ids, axis=(1, 2))
        return {
            name: jnp.where(empty.reshape(-1, *[1] * (value.ndim - 1)), 0, value).astype(value.dtype)
            for name, value in cond.items()
        }

    def _predict(self, params, latents, timesteps, cond):
        time_ids = cond["time_ids"] if "time_ids" in cond else self.whole_picture(latents.shape)
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": time_ids}
        return self._network("unet", params)(latents, timesteps, cond["prompt_embeds"], added)

    def whole_picture(self, latent_shape):
        """Time ids [B, 6] of pictures that were neither resized nor cropped, for latents [B, h, w, c]."""
        size = np.asarray(latent_shape[1:3]) * self.configs["vae"].downsampling
        return np.tile(make_time_ids(size, (0, 0), size), (latent_shape[0], 1))

    def _common_length(self):
        lengths = {}
        for (encoder, folder), tokenizer in zip(self.text_encoders.items(), self.tokenizers):
            lengths[folder] = min(tokenizer.model_max_length, self.configs[encoder].max_position_embeddings)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the two text encoders take prompts of different lengths: {lengths}; expected one")
        return next(iter(lengths.values()))

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
