"""Low-rank layers by themselves; their agreement with PEFT's is in tests/methods and tests/weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models import lora
from imagereward_jax.models.layers import Conv, Linear
from imagereward_jax.weights import mapping


def adapted(build, *, rank=2, alpha=1.0, dropout=0.0):
    """(graphdef, params) of a layer with random low-rank parameters; its own weights are zero."""
    holder = mapping.abstract(lambda: nnx.Dict(layer=build()))
    lora.attach(holder, "layer", rank=rank, alpha=alpha, dropout=dropout)
    state = nnx.to_pure_dict(nnx.state(holder))
    key = jax.random.key(0)
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), leaf.shape) if "lora" in name else jnp.zeros(leaf.shape)
        for i, (name, leaf) in enumerate(state["layer"].items())
    }
    return nnx.split(holder)[0], {"layer": params}


def test_a_convolution_is_adapted_as_a_kernel_of_low_rank():
    """The update is the convolution with the product of B and A, to float32 rounding; padding and stride as the
    layer's."""
    graphdef, params = adapted(lambda: Conv(3, 5, 3, stride=2, padding=1, rngs=nnx.Rngs(0)), rank=2, alpha=3.0)
    x = jax.random.normal(jax.random.key(1), (2, 6, 7, 3))
    down, up = params["layer"]["lora_A"], params["layer"]["lora_B"]
    kernel = 1.5 * jnp.einsum("hwir,ro->hwio", down, up[0, 0])
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(nnx.merge(graphdef, params).layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_key_and_keeps_the_mean():
    """Off without `dropout_key`; the same for the same key; the mean over 2,000 keys is the output without it (5
    standard errors)."""
    graphdef, params = adapted(lambda: Linear(8, 4, rngs=nnx.Rngs(0)), dropout=0.25)
    x = jax.random.normal(jax.random.key(1), (3, 8))

    @jax.jit
    def with_key(key):
        with lora.dropout_key(key):
            return nnx.merge(graphdef, params).layer(x)

    off = nnx.merge(graphdef, params).layer(x)
    np.testing.assert_allclose(off, 0.5 * x @ params["layer"]["lora_A"] @ params["layer"]["lora_B"], rtol=1e-5)
    drawn = np.asarray(jax.vmap(with_key)(jax.random.split(jax.random.key(2), 2000)))
    np.testing.assert_allclose(drawn[7], with_key(jax.random.split(jax.random.key(2), 2000)[7]), rtol=1e-4, atol=1e-5)
    error = drawn.std(0) / np.sqrt(2000)
    assert (error > 0).all()
    assert (np.abs(drawn.mean(0) - off) < 5 * error).all()


def test_each_layer_draws_its_own_dropout():
    network = mapping.abstract(lambda: nnx.List([Linear(64, 1, rngs=nnx.Rngs(0)) for _ in range(2)]))
    lora.attach(network, r"\d", rank=1, alpha=1, dropout=0.5)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.to_pure_dict(nnx.state(network)))
    layers = nnx.merge(nnx.split(network)[0], ones)
    with lora.dropout_key(jax.random.key(0)):
        first, second = (layer(jnp.eye(64)) for layer in layers)
    assert np.any(first != second)


@pytest.mark.parametrize("kind", lora.INITS)
def test_initial_parameters(kind):
    """B is zero. A: gaussian of standard deviation 1 / rank, or uniform in +-1 / sqrt(features); within 5 %."""
    network = mapping.abstract(lambda: nnx.Dict(layer=Linear(400, 100, rngs=nnx.Rngs(0))))
    lora.attach(network, "layer", rank=20, alpha=1)
    params = lora.init(network, jax.random.key(0), kind)["layer"]
    assert not params["lora_B"].any()
    a = params["lora_A"]
    assert a.shape == (400, 20)
    expected = 1 / 20 if kind == "gaussian" else 1 / np.sqrt(400) / np.sqrt(3)
    np.testing.assert_allclose(a.std(), expected, rtol=0.05)
    assert kind == "gaussian" or jnp.abs(a).max() <= 1 / 20


def test_targets_match_whole_parts_of_names():
    network = mapping.abstract(
        lambda: nnx.Dict(to_q=Linear(4, 4, rngs=nnx.Rngs(0)), auto_q=nnx.List([Linear(4, 4, rngs=nnx.Rngs(0))]))
    )
    with pytest.raises(ValueError, match=r"'o_q' matches no layer; names of layers end in auto_q\.0, to_q"):
        lora.attach(network, "o_q", rank=1, alpha=1)
    with pytest.raises(ValueError, match="to_q: rank 5 is more than a layer of 4 -> 4 features has"):
        lora.attach(network, "to_q", rank=5, alpha=1)
    assert lora.attach(network, r"to_q|auto_q\.0", rank=1, alpha=1) == ["auto_q.0", "to_q"]
