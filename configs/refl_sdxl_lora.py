"""ReFL for Stable Diffusion XL at 1024 px with low-rank parameters alone (LoRA, arXiv 2106.09685).

    python -m imagereward_jax.train --config configs/refl_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=refl_data.json --config.data.pairs=/data/pairs --config.eval.prompts=held_out.json

The model is a diffusers folder or its name on the hub; prompts and pairs are as in refl_sd15.py. Of the UNet's 2,567
million parameters 5,806,080 train: rank 4 on the projections of its attention. The base is held in bfloat16, 4.8 GiB of
it the UNet, and has neither gradients nor moments; weights and moments in a checkpoint are 66 MiB. WORKDIR/export holds
pytorch_lora_weights.safetensors, for `generate --lora`, convert/merge_lora.py and PyTorch diffusers'
`load_lora_weights`.

Hardware: one GPU, with --config.accumulation=128 for one sample at a time; with 8, the 16 below does the same. By
`python -m imagereward_jax.plan` an H200 takes 36 samples at a time, and each chip of a TPU v5e:2x4 one, in 13.4 GiB, or
in 8.8 with --config.mesh.fsdp=8. No run on the published weights has been measured by us yet, so no figure is promised
here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_sdxl")
    config.lora.rank = 4
    config.optimizer.learning_rate = 1e-4  # of the size that low-rank parameters are trained with
    config.data.random_crop = False
    config.eval.num_prompts = 32  # two images each
    return config
