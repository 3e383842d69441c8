"""Stable Diffusion 1.x, and 2.x, which differs in sizes only: text to image, and image to latents."""

import jax.numpy as jnp

from imagereward_jax.pipelines.base import TextToImage, encode_ids
from imagereward_jax.weights import components

# As diffusers' StableDiffusionPipeline corrects them in checkpoints where they are absent or different.
SCHEDULER_CORRECTIONS = {"steps_offset": 1, "clip_sample": False}


class StableDiffusion1(TextToImage):
    """The parts of a Stable Diffusion 1.x model; made by `load` or `from_configs`. Attributes: see `TextToImage`."""

    family = "sd1"
    components = ("unet", "vae", "text_encoder")
    text_encoders = {"text_encoder": "tokenizer"}

    def __init__(self, configs, scheduler_config, tokenizer_folders, **options):
        corrected = {"_class_name": "DDIMScheduler"} | scheduler_config | SCHEDULER_CORRECTIONS
        super().__init__(configs, corrected, tokenizer_folders, **options)

    @classmethod
    def from_configs(cls, unet, vae, text_encoder, scheduler, tokenizer_folder, **options):
        """A pipeline without weights, from the contents of the config.json files.

        Args:
            options: dtype, vae_dtype and remat, as for `load`.

        Raises:
            ValueError: naming a field that is not implemented, or parts that do not fit together.
            FileNotFoundError: there is no tokenizer in `tokenizer_folder`.
        """
        given = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        configs = {name: components.read_settings(name, config) for name, config in given.items()}
        return cls(configs, scheduler, {"tokenizer": tokenizer_folder}, **options)

    def tokenize(self, prompts):
        """Token ids of a list of prompts, int32 [B, L], padded and cut to the text encoder's length."""
        return encode_ids(self.tokenizers[0], prompts, self.max_tokens)

    def encode_prompts(self, params, ids):
        """What the UNet is conditioned on: {"prompt_embeds": [B, L, D]} for token ids [B, L]."""
        return {"prompt_embeds": self._network("text_encoder", params)(jnp.asarray(ids)).last_hidden_state}

    def _predict(self, params, latents, timesteps, cond):
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
