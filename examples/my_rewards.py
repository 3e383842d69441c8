"""Rewards of one's own: named in a config (--config.reward.path=jax:my_rewards:warmth) or handed over from Python."""

import jax.numpy as jnp
import numpy as np


def warmth(images):
    """A jax function: float32 [B, H, W, 3] in [0, 1] to [B]. It has a gradient, so every method takes it."""
    return images[..., 0].mean((1, 2)) - images[..., 2].mean((1, 2))


def warm_if_red(images, prompts):
    """A jax function that reads its prompts, which are no texts in a compiled program: `contains` looks into them."""
    return jnp.where(prompts.contains("red"), warmth(images), -warmth(images))


def contrast(images, prompts, metadata):
    """A Python function for DDPO and evaluation: uint8 images, the prompts and the other columns of their rows."""
    scores = images.std((1, 2, 3)) / 255
    wanted = np.array([row.get("contrast", 0.2) for row in metadata])
    return np.where(scores > 0.01, -abs(scores - wanted), np.nan)  # NaN: no verdict on an empty image


def named(images, prompts):
    """A Python function of several scores: their sum is the reward, and each has a curve."""
    return {"light": images.mean((1, 2, 3)) / 255, "short": [-len(prompt) / 100 for prompt in prompts]}


class Target:
    """A jax reward with tokens: `tokenize` sees the texts, before the compiled program; the call sees its arrays."""

    colours = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}

    def tokenize(self, prompts):
        """A colour [B, 3] for B prompts."""
        found = [next((rgb for name, rgb in self.colours.items() if name in text), (0, 0, 0)) for text in prompts]
        return np.array(found, np.float32)

    def __call__(self, images, colours):
        """Less for images whose mean colour is far from the prompt's."""
        return -jnp.square(images.mean((1, 2)) - colours).mean(-1)


target = Target()
