"""Which steps of a sampler decide the reward: variance between images that differ in the noise of one step alone.

    python benchmarks/step_variance.py tiny-shapes --reward tiny-shapes-v2 --guidance 2

For a window of DDPO or GRPO (`config.method.window_low`, `window_high`) before a run: steps whose noise does not move
the reward add their own to the gradient, and cost as much as the others. Prints Markdown: for each step the variance
of the reward within a prompt, whose images begin at one noise and take the other steps without noise; then of all
steps, and of the images as training makes them, each from a noise of its own. The sampler is DDIM.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax import open_reward
from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.sample import ImageSampler
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.training.mesh import make_mesh


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--reward", required=True, help="name, folder, checkpoint or module:function")
    parser.add_argument("--prompts", default="shapes:train", help="file, data set or shapes:train")
    parser.add_argument("--number", type=int, default=64, help="of prompts, drawn from them")
    parser.add_argument("--images", type=int, default=8, help="per prompt")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eta", type=float, default=1.0, help="noise of a step")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--size", type=int, help="of the images, in pixels; default: the model's")
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args(argv)


def main(argv=None):
    """See the module's docstring."""
    arguments = parse_args(argv)
    pipeline, reward = open_pipeline(arguments.model), open_reward(arguments.reward)
    params = jax.tree.map(jnp.asarray, pipeline.load_params())
    size = arguments.size or pipeline.default_size
    noisy, plain = (pipeline.make_sampler("ddim", arguments.steps, eta, size, size) for eta in (arguments.eta, 0.0))
    images = ImageSampler(
        pipeline, noisy, make_mesh(-1, 1), arguments.batch, height=size, width=size, guidance_scale=arguments.guidance
    )
    prompts = list(load_prompts(arguments.prompts))
    chosen = np.random.default_rng(0).permutation(len(prompts))[: arguments.number]
    prompts = [prompts[index] for index in chosen for _ in range(arguments.images)]
    noise_key, step_key = jax.random.split(jax.random.key(0))
    own = np.asarray(jax.random.normal(noise_key, (len(prompts), *images.latent_shape)))
    shared = np.repeat(own[:: arguments.images], arguments.images, axis=0)
    step_keys = jax.random.split(step_key, len(prompts))

    def measure(name, noise, steps):
        images.sampler = noisy.steps_where(np.isin(np.arange(arguments.steps), steps), plain)
        made = to_uint8(images(params, prompts, noise=noise, step_keys=step_keys))
        scores = np.array(reward.score(prompts, made)).reshape(-1, arguments.images)
        print(f"| {name} | {scores.mean():.3f} | {scores.var(axis=1, ddof=1).mean():.4f} |", flush=True)

    everything = list(range(arguments.steps))
    print("| steps with noise | mean reward | variance within a prompt |\n| --- | --- | --- |")
    for step in everything:
        measure(f"{step + 1}", shared, [step])
    measure("all", shared, everything)
    measure("all, each image from its own noise", own, everything)


if __name__ == "__main__":
    main()
