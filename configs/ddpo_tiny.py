"""DDPO on the built-in tiny model with the built-in tiny reward, by scores alone; on a CPU.

    python -m imagereward_jax.train --config configs/ddpo_tiny.py

`--config.reward.path=jpeg-compressibility`, or module:function (a Python function of yours), needs no other change.
Each step samples 64 images, with the guidance that they are evaluated with, and makes two updates. Hardware: one CPU
core, some five minutes. Result to expect at guidance 3, mean of three seeds: the mean reward goes from 1.659 to 1.670
after 640 images, and back to 1.659 after 1,280 (1.623 to 1.681), the share of fully right images from 0.77 to 0.78 and
0.75. So few images are too few for a policy gradient: docs/methods.md. It shows the method at work, not a better model.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("ddpo")
    config.steps = 20
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes"
    config.method.num_steps = 10
    config.method.guidance_scale = 3.0
    config.method.height = 32
    config.method.width = 32
    config.method.rounds = 2
    config.method.timestep_fraction = 0.5
    config.method.clip_range = 1e-3  # of 256 latent numbers, where Stable Diffusion has 16,384
    config.method.prompt_buffer = 0  # a prompt comes too seldom to have statistics of its own
    config.data.prompts = "shapes:train"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.sampler = "ddim"
    config.eval.eta = 1.0
    config.eval.num_steps = 10
    config.eval.guidance_scale = 3.0
    config.eval.every = 10
    config.checkpoint.every = 5
    config.log_every = 1
    config.writers = ("jsonl", "tensorboard")
    return config
