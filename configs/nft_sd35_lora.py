"""DiffusionNFT for Stable Diffusion 3.5 medium at 512 px with LoRA, by the paper's settings (arXiv 2509.16117).

    python -m imagereward_jax.train --config configs/nft_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.reward.path=/models/PickScore_v1 \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt --config.data.cache=/data/encoded

Each step samples 48 groups of 24 images with the old policy, 10 steps of a second-order solver and no guidance, and
makes one update, at 9 noise levels of each image. Evaluation has no guidance either: tuning takes its place. For OCR,
or several rewards, take --config.method.beta=0.1.

Hardware: images at a time are config.method.round_size (24) in sampling and batch_size / accumulation (8) in training,
over all devices. With more devices take a larger round_size and fewer rounds. config.data.cache keeps the encoded
prompts, so that no step runs T5. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "grpo_sd35_lora", method="nft")
    config.batch_size = 1152
    config.accumulation = 144
    config.eval.guidance_scale = 1.0
    return config
