"""AlignProp (arXiv 2310.03739) for Stable Diffusion 1.5 at 512 px, with the settings of TRL's example.

    python -m imagereward_jax.train --config configs/alignprop_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=animals.txt --config.eval.prompts=held_out.txt

A new draw at every step of 50 decides whether it carries gradient. TRL's fixed truncation at timestep T is
--config.method.truncation=last --config.method.gradient_steps=50-T. Low-rank parameters of rank 4 train; the loss is
10 - reward. TRL trains on the aesthetic score (--config.reward.path=Aesthetic).

Hardware: one GPU; --config.accumulation=128 takes one sample at a time. By its authors the reward is over-optimised
within some ten updates: watch the samples, and stop early. No run on the published weights has been measured by us yet,
so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("reward_gradient")
    config.steps = 20
    config.batch_size = 128
    config.accumulation = 32
    config.dtype = "bfloat16"
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.lora.rank = 4
    config.method.truncation = "per_step"
    config.method.eta = 1.0
    config.method.guidance_scale = 5.0
    config.method.target = 10.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.data.prompts = "prompts.txt"
    config.eval.prompts = "held_out.txt"
    config.eval.num_steps = 50
    config.eval.guidance_scale = 5.0
    config.eval.every = 5
    config.checkpoint.every = 5
    config.log_every = 1
    return config
