"""DPO on the built-in tiny model, on 2,000 pairs of images of the shapes world; on a CPU.

    python -m imagereward_jax.train --config configs/dpo_tiny.py

The preferred image of a pair has fewer wrong words or is less spoilt. The tiny reward trains nothing: it scores the
evaluation. Hardware: one CPU core, some five minutes. Result to expect at guidance 3, three seeds: the share of fully
right images rises from 0.77 to 0.79, the mean reward stays at 1.66. With --config.model.path=tiny-shapes-sd3: 0.84 to
0.89, and 1.72 to 1.73.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("dpo")
    config.steps = 200
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes"
    config.data.preferences = "shapes:train"
    config.data.preferences_size = 2000
    config.data.image_size = 32
    config.method.beta = 200.0  # of 256 latent numbers errors differ more; at 2000 some pairs weigh all
    config.optimizer.learning_rate = 5e-5
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.best = "eval/checker_rate"
    config.eval.every = 100
    config.writers = ("jsonl", "tensorboard")
    return config
