"""ReFL for Stable Diffusion 1.4 or 1.5 at 512 px, all of the UNet, as in the ImageReward paper (arXiv 2304.05977).

    python -m imagereward_jax.train --config configs/refl_sd15.py \\
        --config.model.path=/models/stable-diffusion-v1-4 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=refl_data.json --config.data.pairs=/data/pairs --config.eval.prompts=held_out.json

The model is a diffusers folder or its name on the hub; prompts are a JSON, JSONL, CSV, text or Parquet file or a
`datasets` name; pairs are the same with images, or a folder of images. Without pairs pass
--config.method.pretrain=off; people who tuned without the denoising loss report images worse than the untuned
model's.

Hardware: the paper used 8 GPUs of 40 GB for a global batch of 128. On one GPU keep the batch with
--config.accumulation=N; on several the batch is split over them, and --config.mesh.fsdp=N splits the weights'
moments too. Result to expect: the reward on held-out prompts rises from the first evaluation on. No run on the
published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("refl")
    config.steps = 156  # 20,000 prompts in batches of 128
    config.batch_size = 128
    config.accumulation = 16
    config.dtype = "bfloat16"
    config.model.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.reward.path = "ImageReward-v1.0"
    config.data.prompts = "refl_data.json"
    config.data.pairs = "pairs"
    config.data.image_size = 512
    config.data.workers = 4
    config.eval.prompts = "held_out.json"
    config.eval.num_prompts = 32  # two images each
    config.eval.every = 25
    config.checkpoint.every = 25
    config.log_every = 1
    return config
