"""Supervised training of Stable Diffusion 3.5-medium at 1024 px by flow matching, all of the transformer.

    python -m imagereward_jax.train --config configs/sd35_full.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.data.pairs=/data/pairs \\
        --config.data.cache=/data/cache

The settings of diffusers' train_dreambooth_sd3.py and of dive-into-stable-diffusion-v3-5's full training: noise levels
by the logit-normal distribution, loss on the clean latents. Pairs are a folder of images with a .txt beside each or a
metadata file, or a table with a column of images and one of captions (--config.data.pairs_text_column). The cache holds
latents and encoded prompts, so that neither T5 nor the CLIP encoders are held while it trains; images are then cropped
once. --config.eval.prompts=prompts.txt samples held-out prompts; WORKDIR/export opens in diffusers'
StableDiffusion3Pipeline. stable-diffusion-3.5-large has the same recipe.

Hardware: the 2.24 billion parameters that train take 16 bytes each with gradient and moments, 33.4 GiB in all;
--config.mesh.fsdp=8 splits them over 8 devices. No run on the published weights has been measured by us yet, so no
figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("denoising")
    config.steps = 500
    config.batch_size = 8
    config.accumulation = 4
    config.dtype = "bfloat16"
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.data.pairs = "pairs"
    config.data.image_size = 1024
    config.data.caption_dropout = 0.0  # the originals have none; 0.1 keeps guidance in a long training
    config.data.workers = 4
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.num_prompts = 8
    config.eval.guidance_scale = 4.5
    config.eval.best = ""  # without a reward the last weights are exported
    config.eval.every = 250
    config.checkpoint.every = 250
    return config
