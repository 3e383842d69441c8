"""Diffusion-DPO for Stable Diffusion XL at 1024 px with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/dpo_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.data.preferences=/data/pickapic_v2.parquet \\
        --config.eval.prompts=held_out.txt --config.reward.path=/models/PickScore_v1

As dpo_sd15.py; rank, learning rate and batch are those of diffusers' research script for DPO with LoRA, whose beta_dpo
of 2500 is 5000 here. The reference is the model without the adapter and takes no memory. Hardware: pairs at a time are
batch_size / accumulation (4), over all devices. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "dpo_sd15")
    config.batch_size = 32
    config.accumulation = 8
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.lora.rank = 8
    config.data.image_size = 1024
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 0
    return config
