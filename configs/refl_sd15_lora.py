"""ReFL for Stable Diffusion 1.4 or 1.5 at 512 px with low-rank parameters alone (LoRA, arXiv 2106.09685).

    python -m imagereward_jax.train --config configs/refl_sd15_lora.py \\
        --config.model.path=/models/stable-diffusion-v1-5 --config.reward.path=/models/ImageReward.pt \\
        --config.data.prompts=refl_data.json --config.data.pairs=/data/pairs --config.eval.prompts=held_out.json

Inputs are those of refl_sd15.py. Of the UNet's 860 million parameters 797,184 train: rank 4 on the projections of its
attention. The base is held in bfloat16 and has neither gradients nor moments; weights and moments in a checkpoint are
9 MiB. WORKDIR/export holds pytorch_lora_weights.safetensors, for `generate --lora`, convert/merge_lora.py and PyTorch
diffusers' `load_lora_weights`.

Hardware: what refl_sd15.py needs, less some 10 GB of master weights and moments. No run on the published weights has
been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_sd15")
    config.lora.rank = 4
    config.optimizer.learning_rate = 1e-4  # of the size that low-rank parameters are trained with
    return config
