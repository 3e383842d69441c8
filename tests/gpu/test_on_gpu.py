"""Checks on a GPU: `pytest -m gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagereward_jax.models import layers

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
