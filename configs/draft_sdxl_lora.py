"""DRaFT+ for Stable Diffusion XL at 1024 px with low-rank parameters, with the settings of NeMo-Aligner's guide.

    python -m imagereward_jax.train --config configs/draft_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt

DRaFT-1 (arXiv 2309.17400) with a penalty of 0.1 on the mean squared difference to the base model's outputs in the step
with gradient. Low-rank parameters of rank 32 train. Plain DRaFT: --config.method.base_penalty=0.

Hardware: one GPU, with --config.accumulation=4 for one sample at a time. No run on the published weights has been
measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "draft_sd15")
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.lora.rank = 32
    config.method.height = 1024
    config.method.width = 1024
    config.method.num_steps = 25
    config.method.guidance_scale = 5.0
    config.method.base_penalty = 0.1
    config.optimizer.learning_rate = 2.5e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 10.0
    config.eval.num_steps = 25
    config.eval.guidance_scale = 5.0
    return config
