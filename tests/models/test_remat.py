"""The policy that keeps activations in the host's memory: the same gradient, and a program that moves them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models import lora
from imagereward_jax.models.blip import ImageRewardModel
from imagereward_jax.models.blip_config import ImageRewardConfig, TextConfig, VisionConfig
from imagereward_jax.models.layers import Keys
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.remat import REMAT_POLICIES
from imagereward_jax.models.resnet import ResnetBlock2D
from imagereward_jax.models.transformer import Transformer2DModel
from imagereward_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from imagereward_jax.planning import counts

VAE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)
REWARD = ImageRewardConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=16, depth=3, heads=2),
    text=TextConfig(9, 12, 2, 3, 24, max_position_embeddings=8),
    projection_dim=4,
    head_sizes=(8, 8, 8, 4),
    max_prompt_tokens=4,
)


class Part(nnx.Module):
    """A residual block and three transformer layers, one stack, as they follow each other in the UNet."""

    def __init__(self, remat):
        rngs = Keys(nnx.Rngs(0))
        self.resnet = ResnetBlock2D(24, 16, time_features=12, groups=4, eps=1e-5, remat=remat, rngs=rngs)
        self.transformer = Transformer2DModel(16, 2, 10, depth=3, linear=True, groups=4, remat=remat, rngs=rngs)

    def __call__(self, inputs):
        return self.transformer(self.resnet(inputs["x"], inputs["time"]), inputs["context"])


class Decoder(AutoencoderKL):
    def __init__(self, remat):
        super().__init__(VAE, remat=remat, rngs=nnx.Rngs(0))

    def __call__(self, latents):
        return self.decode(latents)


class Scorer(ImageRewardModel):
    """ImageReward, of a prompt of which one token is padding."""

    def __init__(self, remat):
        super().__init__(REWARD, remat=remat, rngs=nnx.Rngs(0))

    def __call__(self, pixels):
        return super().__call__(pixels, np.array([[1, 2, 3, 0]] * 2), np.array([[1, 1, 1, 0]] * 2))


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


INPUTS = {
    Part: {"x": draw(2, 4, 4, 24), "time": draw(2, 12), "context": draw(2, 5, 10)},
    Decoder: draw(2, 4, 4, 4),
    Scorer: draw(2, 16, 16, 3),
}


@functools.cache
def gradient(kind, remat):
    """(the gradient's function, its arguments): by all weights and inputs."""
    layout, state = nnx.split(kind(remat))

    def loss(params, inputs):
        return jnp.sin(nnx.merge(layout, params)(inputs)).sum()

    return jax.value_and_grad(loss, (0, 1)), (nnx.to_pure_dict(state), INPUTS[kind])


def assert_close(tree, reference):
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), tree, reference)


@pytest.mark.parametrize("kind", [Part, Decoder, Scorer])
def test_every_policy_has_the_same_gradient(kind):
    results = {}
    for remat in REMAT_POLICIES:
        function, arguments = gradient(kind, remat)
        results[remat] = jax.jit(function)(*arguments)
    reference = results.pop("none")
    for other in results.values():
        assert_close(other, reference)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("kind, blocks", [(Part, 2), (Decoder, 9), (Scorer, 5)])
def test_only_offload_moves_arrays_to_the_host(kind, blocks, platform):
    """There and back once a block: a residual block and the scan's body; the decoder's 2 + 2 * 2 residual blocks,
    attention, upsampler and last layers; the scorer's 3 + 2 layers."""
    for remat in REMAT_POLICIES:
        function, arguments = gradient(kind, remat)
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        moves = blocks if remat == "offload" else 0
        assert text.count('_xla_buffer_placement = "pinned_host"') == moves
        assert text.count('_xla_buffer_placement = "device"') == moves


def test_what_is_frozen_is_not_differentiated():
    """LoRA's gradient takes about the FLOPs of "blocks" (with all weights' a third more), and dropout drops the same in
    both passes."""
    counted, results = {}, {}
    for remat in ("blocks", "offload"):
        network = Part(remat)
        lora.attach(network, r"attn1\.to_q|attn2\.to_v", rank=2, alpha=2, dropout=0.5)
        layout, base = nnx.split(network)
        base = nnx.to_pure_dict(base)
        adapter = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(network, jax.random.key(0), "kaiming"))

        def loss(adapter, base, layout=layout):
            with lora.dropout_key(jax.random.key(1)):
                return jnp.sin(nnx.merge(layout, join(base, adapter))(INPUTS[Part])).sum()

        function = jax.value_and_grad(loss)
        results[remat] = jax.jit(function)(adapter, base)
        counted[remat] = counts.flops(jax.make_jaxpr(function)(adapter, base))
    assert_close(results["offload"], results["blocks"])
    # traced, it still has each block's last product, whose result nobody uses and which the compiler leaves out
    assert counted["offload"] < 1.1 * counted["blocks"]
