"""GRPO for Stable Diffusion XL at 1024 px with low-rank parameters alone (LoRA).

    python -m imagereward_jax.train --config configs/grpo_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=prompts.txt --config.eval.prompts=held_out.txt

As ddpo_sdxl_lora.py, with the advantages of DanceGRPO (arXiv 2505.07818): groups of 16 images of a prompt, of which
each is compared with the others. No paper tried it on this model. Hardware: images at a time are
config.method.round_size (16) in sampling and batch_size / accumulation (8) in training, over all devices. Result to
expect: not measured yet.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("flow_grpo")
    config.steps = 200
    config.batch_size = 128
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.reward.path = "ImageReward-v1.0"
    config.lora.rank = 4
    config.method.sampler = "ddim"
    config.method.eta = 1.0
    config.method.num_steps = 50
    config.method.timestep_fraction = 0.6
    config.method.guidance_scale = 5.0
    config.method.height = 1024
    config.method.width = 1024
    config.method.group_size = 16
    config.method.rounds = 16
    config.method.round_size = 16
    config.method.advantage_std = "group"
    config.method.sample_std = True
    config.method.advantage_epsilon = 1e-8
    config.data.prompts = "prompts.txt"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "held_out.txt"
    config.eval.num_prompts = 32  # two images each
    config.eval.guidance_scale = 5.0
    config.eval.every = 20
    config.checkpoint.every = 5
    config.log_every = 1
    return config
