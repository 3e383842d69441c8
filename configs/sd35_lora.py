"""Supervised training of Stable Diffusion 3.5-medium at 1024 px with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.data.pairs=/data/pairs \\
        --config.data.cache=/data/cache

As sd35_full.py, with the batch and epochs of dive-into-stable-diffusion-v3-5's LoRA training on 833 pairs. 2,347,008
parameters train: rank 4 on the joint attention's projections of image and text. WORKDIR/export holds
pytorch_lora_weights.safetensors, for `generate --lora` and PyTorch diffusers' `load_lora_weights`.
--config.method.train_text_encoder=True, without the cache, gives both CLIP encoders adapters too.

Hardware: one GPU. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "sd35_full")
    config.steps = 1560  # 30 epochs of 833 pairs
    config.batch_size = 16
    config.lora.rank = 4
    return config
