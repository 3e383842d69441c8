"""Nodes for ComfyUI that score, rank and filter images by human preference.

    python -m imagereward_jax.integrations comfyui PATH_OF_COMFYUI

copies them with their client into ComfyUI's `custom_nodes`. Nothing is installed into ComfyUI's environment: a server
scores (docs/serve.md), which the nodes start from the environment of imagereward-jax if none runs.
"""

import math

import numpy as np
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from .imagereward_client import DEFAULT_URL, LocalServer, installed_python

CATEGORY = "image/imagereward"
SERVER = "IMAGEREWARD_SERVER"  # the type of a link: arguments of LocalServer.connect
INPUTS = {"images": ("IMAGE",), "prompt": ("STRING", {"multiline": True}), "server": (SERVER,)}
local = LocalServer()


def score_images(images, prompt, server):
    """Scores images [B, H, W, C] in [0, 1] for a prompt: a list of B numbers, NaN for no verdict."""
    pixels = np.clip(255.0 * images.cpu().numpy(), 0, 255).astype(np.uint8)  # cut, as ComfyUI's SaveImage does
    pil = [Image.fromarray(image) for image in pixels]
    return local.connect(**server).score_images(pil, [prompt] * len(pil))


def best_first(scores):
    """Indices of scores, the highest first; those without a verdict last."""
    return sorted(range(len(scores)), key=lambda row: math.inf if math.isnan(scores[row]) else -scores[row])


class ImageRewardServer:
    """Names the server; it is started at the first score if nobody answers there."""

    CATEGORY, FUNCTION = CATEGORY, "settings"
    RETURN_TYPES, RETURN_NAMES = (SERVER,), ("server",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "reward": ("STRING", {"default": "ImageReward-v1.0"}),
                "url": ("STRING", {"default": DEFAULT_URL}),
                "python": ("STRING", {"default": installed_python()}),
                "device": (["default", "cpu"],),
            }
        }

    def settings(self, reward, url, python, device):
        return ({"reward": reward, "url": url, "python": python, "device": device},)


class ImageRewardScore:
    """Scores a batch of images for a prompt: the scores, and a text with one per line."""

    CATEGORY, FUNCTION = CATEGORY, "score"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("FLOAT", "STRING"), ("scores", "text"), (True, False)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": INPUTS}

    def score(self, images, prompt, server):
        scores = score_images(images, prompt, server)
        return scores, "\n".join(f"{score:.4f}" for score in scores)


class ImageRewardRank:
    """Sorts a batch of images, the best first."""

    CATEGORY, FUNCTION = CATEGORY, "rank"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("IMAGE", "FLOAT"), ("images", "scores"), (False, True)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": INPUTS}

    def rank(self, images, prompt, server):
        scores = score_images(images, prompt, server)
        order = best_first(scores)
        return images[order], [scores[row] for row in order]


class ImageRewardFilter:
    """Keeps the images that score at least `limit`, the best first, and of them at most `count` (0: all).

    If there are none, what follows is not executed.
    """

    CATEGORY, FUNCTION = CATEGORY, "keep"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("IMAGE", "FLOAT"), ("images", "scores"), (False, True)

    @classmethod
    def INPUT_TYPES(cls):
        limit = ("FLOAT", {"default": 0.0, "min": -1e6, "max": 1e6, "step": 0.01})
        return {"required": {**INPUTS, "limit": limit, "count": ("INT", {"default": 0, "min": 0, "max": 4096})}}

    def keep(self, images, prompt, server, limit, count):
        scores = score_images(images, prompt, server)
        order = best_first(scores)
        kept = [row for row in order if scores[row] >= limit][: count or None]
        if not kept:
            best = scores[order[0]]
            print(f"ImageReward: no image of {len(scores)} scores {limit:g} or more (the best {best:.4f})")
            return ExecutionBlocker(None), [ExecutionBlocker(None)]
        return images[kept], [scores[row] for row in kept]


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (ImageRewardServer, ImageRewardScore, ImageRewardRank, ImageRewardFilter)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ImageRewardServer": "ImageReward server",
    "ImageRewardScore": "Score images (ImageReward)",
    "ImageRewardRank": "Rank images (ImageReward)",
    "ImageRewardFilter": "Filter images (ImageReward)",
}
