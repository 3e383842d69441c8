"""AWM for Stable Diffusion 3.5 medium at 512 px with LoRA, by the paper's settings (arXiv 2509.25050).

    python -m imagereward_jax.train --config configs/awm_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.reward.path=/models/PickScore_v1 \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt --config.data.cache=/data/encoded

Each step samples 48 groups of 24 images with 14 steps and no guidance, and makes one update, at 6 noise levels of each
image. The paper samples by SA-Solver, this recipe by DPM-Solver++ (2M).

Hardware: images at a time are config.method.round_size (24) in sampling and batch_size / accumulation (8) in training,
over all devices. With more devices take a larger round_size and fewer rounds. config.data.cache keeps the encoded
prompts, so that no step runs T5. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "nft_sd35_lora", method="awm")
    return config
