"""GRPO on the built-in tiny model with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/grpo_tiny.py

As ddpo_tiny.py but for the advantages: eight groups of eight images per step, each image compared with the others of
its prompt. Hardware: 2 CPU cores. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("flow_grpo")
    config.steps = 60
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes"
    config.method.sampler = "ddim"
    config.method.eta = 1.0
    config.method.guidance_scale = 3.0
    config.method.height = 32
    config.method.width = 32
    config.method.group_size = 8
    config.method.rounds = 2
    config.method.timestep_fraction = 0.5
    config.method.clip_range = 1e-3  # of 256 latent numbers, where Stable Diffusion has 16,384
    config.data.prompts = "shapes:train"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.num_steps = 10
    config.eval.guidance_scale = 3.0
    config.eval.every = 20
    config.checkpoint.every = 5
    config.log_every = 1
    config.writers = ("jsonl", "tensorboard")
    return config
