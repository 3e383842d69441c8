"""DDPO for Stable Diffusion XL at 1024 px with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/ddpo_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=animals.txt --config.eval.prompts=animals.txt

Inputs and settings are those of ddpo_sd15.py, which the paper did not try on this model. Hardware: images at a time
are config.method.round_size (16) in sampling and batch_size / accumulation (8) in training, over all devices. The
states of 256 samples are 6.3 GiB of the hosts' memory, half of that with --config.method.state_dtype=bfloat16. Result
to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "ddpo_sd15")
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.method.height = 1024
    config.method.width = 1024
    config.method.rounds = 16
    config.method.round_size = 16
    return config
