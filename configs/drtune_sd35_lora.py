"""DRTune (arXiv 2405.00760) for Stable Diffusion 3.5-medium at 512 px with low-rank parameters.

    python -m imagereward_jax.train --config configs/drtune_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.data.prompts=prompts.txt \\
        --config.eval.prompts=held_out.txt --config.data.cache=/data/cache

The settings of drtune_sd15.py, which FlowBP's code has for this model (arXiv 2606.11075): three steps with gradient,
the sampler stopped in the last 40 % of 25 steps, guidance 3.5, relu(0.55 - HPSv2.1). FlowBP-Sparse is
--config.method.truncation=weighted --config.method.stop_min=None, LeapAlign --config.method.truncation=leap
--config.method.stop_min=None --config.method.gradient_steps=1, DRaFT-K --config.method.truncation=last.

Hardware: the three calls of a sample are one batch; one GPU, with --config.accumulation=64 for one sample at a time. No
run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "drtune_sd15")
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.lora.rank = 32
    config.lora.alpha = 64.0
    config.method.sampler = "euler"
    config.method.guidance_scale = 3.5
    config.optimizer.learning_rate = 1e-4  # of the size that low-rank parameters are trained with
    config.eval.guidance_scale = 3.5
    return config
