"""ReFL on the built-in tiny model with its second built-in reward: the whole of the main job in minutes, on a CPU.

    python -m imagereward_jax.train --config configs/refl_tiny.py

Hardware: 2 CPU cores, some five minutes. Result to expect: on 64 held-out prompts of four images, mean of three seeds,
the share of fully right images rises from 0.77 to 0.90 (0.88 to 0.93) at guidance 3 and the mean reward from 1.27 to
1.48 (its standard deviation over prompts is 0.48 at the start). Other guidances gain as well: docs/methods.md.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("refl")
    config.steps = 60
    config.batch_size = 32
    config.model.path = "tiny-shapes"
    config.model.remat = "none"
    config.reward.path = "tiny-shapes-v2"
    config.method.sampler = "ddim"
    config.method.num_steps = 10
    config.method.stop_min = 5
    config.method.stop_max = 9
    config.method.height = 32
    config.method.width = 32
    config.method.scale = 1.0  # so that the reward's gradient is not drowned by the denoising loss's in AdamW's moments
    config.method.pretrain = "alternate"
    config.data.prompts = "shapes:train"
    config.data.pairs = "shapes:train"
    config.data.image_size = 32
    config.data.caption_noise = 0.2  # as the model was pretrained: the pairs teach nothing new
    config.method.guidance_scale = 1.0
    config.method.guidance_max = 5.0  # the model is used with any guidance, so it is tuned with any
    config.method.negative_gradient = False  # else it learns to strengthen guidance, not to heed prompts
    config.method.unit_gradient = True  # else high guidance outweighs low
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_steps = 20
    config.ema_decay = 0.98
    config.eval.prompts = "shapes:held_out"
    config.eval.num_prompts = 64
    config.eval.images_per_prompt = 4
    config.eval.batch_size = 64
    config.eval.num_steps = 20
    config.eval.guidance_scale = 3.0  # of use: the untuned model's best
    config.eval.guidance_scales = (1.0, 2.0, 5.0)
    config.eval.every = 30
    config.checkpoint.every = 30
    config.log_every = 5
    config.writers = ("jsonl", "tensorboard")
    return config
