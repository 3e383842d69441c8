"""A tiny Stable Diffusion 3.5 of the shapes world, trained by flow matching on noisily captioned images.

    python -m imagereward_jax.train --config configs/shapes_vae_sd3.py
    python -m imagereward_jax.train --config configs/shapes_pretrain_sd3.py

Starts from the first command's autoencoder, a random transformer and random text encoders. Captions are noisy as in
configs/shapes_pretrain.py. The export is the built-in model `tiny-shapes-sd3`.

Hardware: 2 CPU cores. Result to expect: not measured yet.
"""

from imagereward_jax.recipes import recipe_beside


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "shapes_pretrain")
    config.steps = 6000
    config.model.path = "runs/shapes_vae_sd3/export"
    config.method.timestep_power = 1.0  # of betas alone
    config.method.precondition_outputs = False
    config.eval.sampler = "euler"
    return config
