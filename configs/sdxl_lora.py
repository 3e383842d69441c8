"""Supervised training of Stable Diffusion XL at 1024 px with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.data.pairs=/data/pairs

Settings of the guide to diffusers' train_text_to_image_lora_sdxl.py: rank 4 on the UNet's attention, 5,806,080
parameters, one pair at a time. Data as in sd15_full.py; --config.method.train_text_encoder=True gives both text
encoders adapters too. WORKDIR/export holds pytorch_lora_weights.safetensors, for `generate --lora` and PyTorch
diffusers' `load_lora_weights`.

Hardware: one GPU. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "sd15_full")
    config.steps = 2000
    config.batch_size = 1
    config.accumulation = 1
    config.ema_decay = 0.0
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.lora.rank = 4
    config.data.image_size = 1024
    config.optimizer.learning_rate = 1e-4
    return config
