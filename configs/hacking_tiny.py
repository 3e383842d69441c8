"""A reward that can be hacked, and the watch that catches it: ReFL on the built-in tiny model, paid for brightness.

    python -m imagereward_jax.train --config configs/hacking_tiny.py

At the top of the repository, where Python finds the reward in this file. White images please it most, so the shapes
fade: the reward rises, the checker and the tiny reward, which only judges here, fall, and the run ends before its last
step and exports the best checkpoint by the checker. See docs/watch.md.

Hardware: 2 CPU cores, some five minutes. Result to expect: stopped at step 20, the model of before the first step
exported.
"""

from imagereward_jax.recipes import judge, recipe_beside


def brightness(images):
    """Ten times the mean of each image: [B, H, W, 3] in [0, 1] to [B]."""
    return 10 * images.mean((1, 2, 3))


def get_config():
    """The recipe."""
    config = recipe_beside(__file__, "refl_tiny")
    config.method.stop_min = 2
    config.reward.path = "jax:configs.hacking_tiny:brightness"
    config.method.threshold = 20.0  # out of reach: there is always more to gain
    config.method.pretrain = "off"
    config.method.guidance_max = None
    config.method.negative_gradient = True
    config.method.unit_gradient = False
    config.optimizer.learning_rate = 2e-4
    config.ema_decay = 0.95
    config.eval.guidance_scale = 1.0
    config.eval.guidance_scales = ()
    config.eval.judges = {"tiny": judge("tiny-shapes")}
    config.eval.every = 5
    config.checkpoint.every = 5
    config.stop.judge = "eval/checker_rate"
    return config
