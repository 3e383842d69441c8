"""ReFL on the built-in tiny model with the built-in tiny reward: the whole of the main job in minutes, on a CPU.

python -m imagereward_jax.train --config configs/refl_tiny.py
"""

from imagereward_jax.training.config import default_config


def get_config():
    """The recipe."""
    config = default_config("refl")
    config.steps = 120
    config.batch_size = 16
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes"
    config.method.sampler = "ddim"
    config.method.num_steps = 10
    config.method.stop_min = 1
    config.method.stop_max = 9
    config.method.height = 32
    config.method.width = 32
    config.method.pretrain = "alternate"
    config.data.prompts = "shapes:train"
    config.data.pairs = "shapes:train"
    config.data.image_size = 32
    config.optimizer.learning_rate = 1e-4
    config.ema_decay = 0.9
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 2
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 2.0
    config.eval.every = 60
    config.checkpoint.every = 60
    config.log_every = 5
    config.writers = ("jsonl", "tensorboard")
    return config
