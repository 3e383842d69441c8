"""AlignProp (arXiv 2310.03739) for Stable Diffusion XL at 1024 px with low-rank parameters.

    python -m imagereward_jax.train --config configs/alignprop_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=animals.txt --config.eval.prompts=held_out.txt

The settings of alignprop_sd15.py, which were published for Stable Diffusion 1.5 alone. Hardware: one GPU, with
--config.accumulation=128 for one sample at a time. No run on the published weights has been measured by us yet, so no
figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "alignprop_sd15")
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.method.height = 1024
    config.method.width = 1024
    return config
