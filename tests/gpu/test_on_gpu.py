"""Checks on a GPU: `pytest -m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models import layers
from imagereward_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
@pytest.mark.parametrize(("queries", "keys"), [(4096, 4096), (1024, 77), (64, 64)])
def test_attention_agrees_with_plain_float32(head_dim, queries, keys):
    """Forward and gradient in bfloat16 within its rounding (2 % of the largest entry) of float32 attention."""
    shapes = [(2, length, 4, head_dim) for length in (queries, keys, keys)]
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]

    def total(query, key, value):
        return jnp.sum(jnp.sin(layers.attention(query, key, value).astype(jnp.float32)))

    halves = [x.astype(jnp.bfloat16) for x in inputs]
    got = [layers.attention(*halves), *jax.grad(total, (0, 1, 2))(*halves)]
    expected = [layers.attention(*inputs), *jax.grad(total, (0, 1, 2))(*inputs)]
    for ours, plain in zip(got, expected):
        ours, plain = (np.asarray(x, np.float32) for x in (ours, plain))
        np.testing.assert_allclose(ours, plain, atol=0.02 * np.abs(plain).max())


def test_scores_of_the_built_in_reward_are_those_of_the_cpu():
    """float32 on the GPU against float32 on the CPU, within 1e-4."""
    import imagereward_jax

    images = list(np.random.default_rng(0).random((4, 32, 32, 3), np.float32))
    scores = [
        imagereward_jax.load("tiny-shapes", device=d).score("a small blue cross in the center", images)
        for d in ("gpu", "cpu")
    ]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_activations_that_wait_in_the_hosts_memory_give_the_same_gradient():
    """remat="offload" against "blocks", float32, by all weights of a small UNet; within 1e-4 of the largest."""
    settings = {
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 3],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
    }
    keys = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(keys[0], (2, 8, 8, 4)), jnp.array([1, 900]), jax.random.normal(keys[1], (2, 7, 64))
    gradients = []
    for remat in ("blocks", "offload"):
        config = UNet2DConditionConfig.from_dict(settings)
        layout, params = nnx.split(UNet2DConditionModel(config, remat=remat, rngs=nnx.Rngs(0)))

        def loss(params, layout=layout):
            return jnp.square(nnx.merge(layout, params)(*inputs)).mean()

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(nnx.to_pure_dict(params))))
    for plain, ours in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * np.abs(plain).max() + 1e-7)
