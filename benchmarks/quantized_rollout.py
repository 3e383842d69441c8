"""Effect of a UNet in int8 or fp8 (`config.method.rollout_quantization`) on the images of the built-in model.

    python benchmarks/quantized_rollout.py

Runs DDIM from the same noise to the end, without guidance, for held-out captions of the shapes world. Prints JSON, a
line for each kind: the distance of the final latents from float32's (root mean square, relative), the mean absolute
difference of the images in [0, 1] (of all, and of the image that moved most), the mean reward, and the mean absolute
difference of an image's reward. Measures no speed.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from common import versions

from imagereward_jax import load
from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.diffusion.rollout import rollout
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.models.quantized import DTYPES
from imagereward_jax.pipelines import load_pipeline


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main():
    args = parse_args()
    pipeline, params = load_pipeline("tiny-shapes")
    reward = load("tiny-shapes")
    sampler = make_sampler("ddim", pipeline.scheduler_config, args.steps)
    prompts = list(load_prompts("shapes:held_out"))[: args.prompts]
    shape = pipeline.latent_shape(pipeline.default_size, pipeline.default_size)
    noise = jax.random.normal(jax.random.key(0), (len(prompts), *shape))
    ids, tokens = pipeline.tokenize(prompts), reward.tokenize(prompts)

    @jax.jit
    def run(params, narrow):
        cond = pipeline.encode_prompts(params, ids)
        latents = rollout(pipeline.denoiser_for(cond), sampler, noise, None, params=narrow).state.latents
        images = jnp.clip(pipeline.decode(params, latents), 0.0, 1.0)
        return latents, images, reward.apply(reward.params, images, tokens)

    exact = None
    for kind in ("none", *DTYPES):
        latents, images, rewards = found = jax.device_get(run(params, pipeline.quantized(params, kind)))
        exact = exact or found
        moved = np.abs(images - exact[1]).mean((1, 2, 3))
        figures = {
            "kind": kind,
            "images": len(prompts),
            "latents": float(np.linalg.norm(latents - exact[0]) / np.linalg.norm(exact[0])),
            "pixels": float(moved.mean()),
            "pixels_of_the_worst": float(moved.max()),
            "reward": float(rewards.mean()),
            "reward_moved": float(np.abs(rewards - exact[2]).mean()),
        }
        print(json.dumps(figures | {"versions": versions("jax", "flax", "qwix")}), flush=True)


if __name__ == "__main__":
    main()
