"""ReFL for Stable Diffusion XL at 1024 px, all of the UNet, by the recipe of the ImageReward paper (arXiv 2304.05977).

    python -m imagereward_jax.train --config configs/refl_sdxl.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=refl_data.json --config.data.pairs=/data/pairs --config.eval.prompts=held_out.json

The model is a diffusers folder or its name on the hub; prompts are a JSON, JSONL, CSV, text or Parquet file or a
`datasets` name; pairs are the same with images, or a folder of images. Each pair's original size and crop go to the
UNet, as SDXL was trained. Without pairs pass --config.method.pretrain=off. A wide image is tuned with
--config.method.height=832 --config.method.width=1216.

Hardware: weights, gradient and AdamW's moments of the 2.6 billion parameters take 16 bytes each, 38 GiB in all;
--config.mesh.fsdp=8 splits them over 8 devices. Each device takes batch_size / devices / accumulation samples at a
time: 1 with 8 devices and the accumulation of 16 below; with one device pass --config.accumulation=128. Result to
expect: the reward on held-out prompts rises from the first evaluation on. No run on the published weights has been
measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("refl")
    config.steps = 156  # 20,000 prompts in batches of 128
    config.batch_size = 128
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.reward.path = "ImageReward-v1.0"
    config.method.height = 1024
    config.method.width = 1024
    config.data.prompts = "refl_data.json"
    config.data.pairs = "pairs"
    config.data.image_size = 1024
    config.data.random_crop = True
    config.data.workers = 4
    config.eval.prompts = "held_out.json"
    config.eval.guidance_scale = 5.0
    config.eval.every = 25
    config.checkpoint.every = 25
    config.log_every = 1
    return config
