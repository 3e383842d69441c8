"""DreamBooth (arXiv 2208.12242) on Stable Diffusion 3.5-medium at 512 px with low-rank parameters.

    python -m imagereward_jax.train --config configs/dreambooth_sd35_lora.py \\
        --config.model.path=/models/stable-diffusion-3.5-medium --config.data.pairs=/data/my_dog \\
        --config.method.instance_prompt="a photo of sks dog" --config.eval.prompts=prompts.txt

The folder holds a handful of images of one subject. Settings of the guide to diffusers' train_dreambooth_lora_sd3.py.
--config.method.class_prompt="a photo of dog" preserves the prior: before training the model makes 100 images of it
in WORKDIR/class_images, or those that --config.method.class_images=FOLDER lacks; each batch then holds as many of them.

Hardware: one GPU. No run on the published weights has been measured by us yet, so no figure is promised here.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("dreambooth")
    config.steps = 500
    config.batch_size = 4
    config.accumulation = 4
    config.dtype = "bfloat16"
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.lora.rank = 4
    config.method.instance_prompt = "a photo of sks dog"
    config.data.pairs = "instances"
    config.data.image_size = 512
    config.data.random_crop = True
    config.optimizer.learning_rate = 4e-4
    config.optimizer.weight_decay = 1e-4
    config.eval.num_prompts = 4
    config.eval.batch_size = 4
    config.eval.guidance_scale = 4.5
    config.eval.every = 100
    config.checkpoint.every = 100
    return config
