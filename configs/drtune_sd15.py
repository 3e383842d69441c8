"""DRTune (arXiv 2405.00760) for Stable Diffusion 1.5 at 512 px, all of the UNet, with the settings of FlowBP's code.

    python -m imagereward_jax.train --config configs/drtune_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.data.prompts=prompts.txt \\
        --config.eval.prompts=held_out.txt

Three equally spaced steps carry gradient, and the sampler stops in the last 40 % of its 25 steps. Those settings, the
learning rate, the batch and the loss relu(0.55 - HPSv2.1) were published for Stable Diffusion 3.5 (arXiv 2606.11075);
guidance is that of Stable Diffusion 1.5.

Hardware: the three calls of a sample are one batch, so that each device takes three times
batch_size / devices / accumulation images through the UNet's backward pass; one GPU needs more accumulation, or
--config.lora.rank=32. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("reward_gradient")
    config.steps = 300
    config.batch_size = 64
    config.accumulation = 8
    config.dtype = "bfloat16"
    config.ema_decay = 0.995
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.reward.path = "HPSv2.1"
    config.method.truncation = "spaced"
    config.method.gradient_steps = 3
    config.method.num_steps = 25
    config.method.stop_min = 15
    config.method.loss = "hinge"
    config.method.target = 0.55
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 1e-4
    config.data.prompts = "prompts.txt"
    config.eval.prompts = "held_out.txt"
    config.eval.num_steps = 25
    config.eval.guidance_scale = 7.5
    config.eval.every = 50
    config.checkpoint.every = 50
    return config
