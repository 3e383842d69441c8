"""DreamBooth (arXiv 2208.12242) on Stable Diffusion XL at 1024 px with low-rank parameters.

    python -m imagereward_jax.train --config configs/dreambooth_sdxl_lora.py \\
        --config.model.path=/models/stable-diffusion-xl-base-1.0 --config.data.pairs=/data/my_dog \\
        --config.method.instance_prompt="a photo of sks dog" --config.eval.prompts=prompts.txt

Settings of the guide to diffusers' train_dreambooth_lora_sdxl.py; folders, prompts and prior preservation as in
dreambooth_sd35_lora.py. Hardware: one GPU. No run on the published weights has been measured by us yet, so no figure is
promised here.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "dreambooth_sd35_lora")
    config.model.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.data.image_size = 1024
    config.optimizer.learning_rate = 1e-4
    config.eval.guidance_scale = 5.0
    return config
