"""ReFL for Stable Diffusion 3.5-medium at 512 px with low-rank parameters alone (LoRA, arXiv 2106.09685).

    python -m imagereward_jax.train --config configs/refl_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=refl_data.json --config.eval.prompts=held_out.json --config.data.cache=/data/cache

ReFL's own sampler, stops, loss and batch (dive-into-stable-diffusion-v3-5 has them for Stable Diffusion 1.4 alone):
40 steps, stopped at one of the last ten, without guidance, mean(relu(2 - reward)) * 1e-3. 2,347,008 parameters train.
The cache holds the encoded prompts, so that no text encoder is held while it trains. With image-text pairs,
--config.method.pretrain=alternate and --config.data.pairs=/data/pairs, the flow loss keeps the images' looks.

Hardware: one GPU, with --config.accumulation=64 for one sample at a time. No run on the published weights has been
measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("refl")
    config.steps = 100
    config.batch_size = 64
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.reward.path = "ImageReward-v1.0"
    config.lora.rank = 4
    config.method.sampler = "euler"
    config.method.pretrain = "off"
    config.data.prompts = "refl_data.json"
    config.data.image_size = 512
    config.optimizer.learning_rate = 1e-4  # of the size that low-rank parameters are trained with
    config.eval.prompts = "held_out.json"
    config.eval.guidance_scale = 4.5
    config.eval.every = 25
    config.checkpoint.every = 25
    config.log_every = 1
    return config
