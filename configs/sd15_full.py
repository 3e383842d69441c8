"""Supervised training of Stable Diffusion 1.5 at 512 px, all of the UNet.

    python -m imagereward_jax.train --config configs/sd15_full.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.data.pairs=/data/pairs

Settings of the guide to diffusers' train_text_to_image.py. Pairs are a folder of images with a .txt or a metadata file,
or a table with a column of images and one of captions (--config.data.pairs_text_column).
--config.eval.prompts=prompts.txt samples held-out prompts.

Hardware: weights, their average, gradient and moments of the 860 million parameters take 20 bytes each, 16 GiB in all;
one GPU. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("denoising")
    config.steps = 15_000
    config.batch_size = 4
    config.accumulation = 4
    config.dtype = "bfloat16"
    config.ema_decay = 0.9999
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.data.pairs = "pairs"
    config.data.image_size = 512
    config.data.random_flip = True
    config.data.caption_dropout = 0.0
    config.data.workers = 4
    config.optimizer.learning_rate = 1e-5
    config.eval.num_prompts = 8
    config.eval.best = ""  # without a reward the last weights are exported
    config.eval.every = 1000
    config.checkpoint.every = 500
    return config
