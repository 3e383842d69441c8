"""Cost of a training step of the reward model with whole groups, relative to all their pairs one by one.

    python benchmarks/ranking_modes.py [--full]

Loss and gradient are the same in both modes (tests/methods/test_ranking.py). FLOPs are XLA's count of the gradient.
Times are medians of compiled steps of a small network. --full counts the FLOPs of ImageReward v1.0 instead.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagereward_jax.methods.base import Models
from imagereward_jax.methods.ranking import Config, make_loss
from imagereward_jax.models.blip import ImageRewardModel
from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig, VisionConfig
from imagereward_jax.weights import mapping

SMALL = ImageRewardConfig(
    vision=VisionConfig(image_size=64, patch_size=16, width=128, depth=4, heads=4),
    text=TextConfig(1000, 96, 4, 4, 384, max_position_embeddings=35),
    projection_dim=16,
    head_sizes=(64, 32, 16, 8),
)


class Reward:
    """An ImageReward without its tokenizer."""

    def __init__(self, config):
        self.config = config
        self.module = mapping.abstract(lambda: ImageRewardModel(config, rngs=nnx.Rngs(0)))

    def apply(self, params, images, tokens):
        return nnx.merge(nnx.graphdef(self.module), params)(images, **tokens)


def batch_shapes(config, groups, size):
    """Shapes of a batch: `groups` groups of `size` images each."""
    side, length = config.vision.image_size, config.max_prompt_tokens
    ids = jax.ShapeDtypeStruct((groups, length), jnp.int32)
    return {
        "images": jax.ShapeDtypeStruct((groups, size, side, side, 3), jnp.float32),
        "ranking": jax.ShapeDtypeStruct((groups, size), jnp.int32),
        "reward": {"input_ids": ids, "attention_mask": ids},
    }


def gradient(reward):
    """(params, batch) -> gradient of the ranking loss."""
    loss = make_loss(Config(), reward.apply)
    return jax.jit(jax.grad(lambda params, batch: loss(Models({"reward": params}), batch, jax.random.key(0))[0].value))


def flops(reward, groups, size):
    """Counts the FLOPs of a gradient by XLA; computes nothing."""
    params = mapping.params_of(reward.module)
    return gradient(reward).lower(params, batch_shapes(reward.config, groups, size)).cost_analysis()["flops"]


def seconds(reward, groups, size, repeats=7):
    """Median seconds of a gradient."""
    rng = np.random.default_rng(0)

    def fill(shape):
        if shape.dtype == jnp.int32:
            return jnp.ones(shape.shape, jnp.int32) * (1 + jnp.arange(shape.shape[-1]))
        return jnp.asarray(rng.standard_normal(shape.shape, np.float32))

    params = mapping.params_of(ImageRewardModel(reward.config, rngs=nnx.Rngs(0)))
    batch, step = jax.tree.map(fill, batch_shapes(reward.config, groups, size)), gradient(reward)
    jax.block_until_ready(step(params, batch))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(params, batch))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="FLOPs of ImageReward v1.0, without times")
    args = parser.parse_args()
    reward = Reward(ImageRewardConfig() if args.full else SMALL)
    print(f"{'group':>5} {'pairs':>5} {'GFLOPs, groups':>15} {'pairs':>10} {'ratio':>6}  ms, groups / pairs / ratio")
    for size in (4, 8):
        pairs = size * (size - 1) // 2
        whole, each = flops(reward, 1, size) / 1e9, flops(reward, pairs, 2) / 1e9
        line = f"{size:>5} {pairs:>5} {whole:>15.2f} {each:>10.2f} {whole / each:>6.3f}"
        if not args.full:
            whole, each = 1e3 * seconds(reward, 1, size), 1e3 * seconds(reward, pairs, 2)
            line += f"  {whole:.1f} / {each:.1f} / {whole / each:.3f}"
        print(line)


if __name__ == "__main__":
    main()
