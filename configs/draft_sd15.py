"""DRaFT-1 (arXiv 2309.17400) for Stable Diffusion 1.4 or 1.5 at 512 px: the paper's small runs.

    python -m imagereward_jax.train --config configs/draft_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-4 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt

Low-rank parameters of rank 8 train by the reward's gradient through the last of 50 steps; the loss is -reward. The
paper's large runs: --config.lora.rank=32 --config.optimizer.learning_rate=2e-4 --config.batch_size=16
--config.steps=10000. DRaFT-LV: --config.method.noisings=2. The last step's gradient is eight times smaller than that of
the step before, which AdamW evens out and a fixed bound does not: gradients are not clipped here.

Hardware: one GPU. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("reward_gradient")
    config.steps = 2000
    config.batch_size = 4
    config.dtype = "bfloat16"
    config.model.path = "CompVis/stable-diffusion-v1-4"
    config.lora.rank = 8
    config.optimizer.learning_rate = 4e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 0.0
    config.data.prompts = "prompts.txt"
    config.eval.prompts = "held_out.txt"
    config.eval.num_steps = 50
    config.eval.guidance_scale = 7.5
    config.eval.every = 200
    config.checkpoint.every = 200
    return config
