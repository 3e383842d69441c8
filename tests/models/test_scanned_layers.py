"""Stacked layers against the same layers one by one, and what the checkpoints and adapters see of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models import lora, scanned_layers
from imagereward_jax.models.dropout import drop, noise
from imagereward_jax.models.layers import Keys, Linear
from imagereward_jax.weights import mapping


class Layer(nnx.Module):
    """A residual linear layer with dropout."""

    def __init__(self, rngs):
        self.linear = Linear(6, 6, rngs=rngs)

    def __call__(self, x, shift):
        return x + drop(jnp.tanh(self.linear(x)) + shift, "test")


class Network(nnx.Module):
    """What holds a stack at some attribute."""

    def __init__(self, depth):
        rngs = Keys(nnx.Rngs(0))
        self.first = Linear(6, 6, rngs=rngs)
        self.blocks = scanned_layers.stack([Layer(rngs) for _ in range(depth)])

    def __call__(self, x, shift):
        return scanned_layers.run_layers(self.blocks, self.first(x), shift)


class Listed(Network):
    """The same layers, one by one."""

    def __init__(self, depth):
        rngs = Keys(nnx.Rngs(0))
        self.first = Linear(6, 6, rngs=rngs)
        self.blocks = nnx.List([Layer(rngs) for _ in range(depth)])

    def __call__(self, x, shift):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, shift)
        return x


@pytest.mark.parametrize("depth", [1, 3])
def test_as_one_by_one_forward_and_gradient_and_in_the_checkpoint(depth):
    x = jax.random.normal(jax.random.key(0), (2, 6))
    results = {}
    for kind in (Network, Listed):
        network = kind(depth)
        layout, params = nnx.split(network)

        def loss(params, layout=layout):
            return jnp.square(nnx.merge(layout, params)(x, 0.3)).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        tensors = mapping.to_torch(network, nnx.to_pure_dict(params))
        results[kind] = float(value), mapping.to_torch(network, nnx.to_pure_dict(gradient)), tensors
    assert results[Network][0] == pytest.approx(results[Listed][0], rel=1e-6)
    for ours, theirs in zip(results[Network][1:], results[Listed][1:]):
        assert sorted(ours) == sorted(theirs) and "blocks.0.linear.weight" in ours
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_checkpoint_round_trip_and_its_errors():
    network = Network(3)
    params = nnx.to_pure_dict(nnx.state(network))
    tensors = mapping.to_torch(network, params)
    jax.tree.map(np.testing.assert_array_equal, mapping.from_torch(network, tensors), params)
    del tensors["blocks.2.linear.bias"]
    tensors["blocks.3.linear.bias"] = tensors["blocks.1.linear.bias"]
    with pytest.raises(mapping.CheckpointMismatch, match=r"(?s)blocks\.2\.linear\.bias.*blocks\.3\.linear\.bias"):
        mapping.from_torch(network, tensors)


def test_runs_of_equal_layers_are_numbered_as_one_list():
    class Wide(Layer):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.more = Linear(6, 6, rngs=rngs)

    class Runs(nnx.Module):
        def __init__(self):
            kinds, rngs = (Layer, Wide, Wide, Layer), Keys(nnx.Rngs(0))
            self.blocks = scanned_layers.stack_runs([kind(rngs) for kind in kinds], kinds)

    network = Runs()
    assert [run.stacked for run in network.blocks] == [1, 2, 1]
    tensors = mapping.to_torch(network, nnx.to_pure_dict(nnx.state(network)))
    kernels = {key for key in tensors if key.endswith("weight")}
    assert kernels == {f"blocks.{index}.linear.weight" for index in range(4)} | {
        f"blocks.{index}.more.weight" for index in (1, 2)
    }
    params = mapping.from_torch(network, tensors)
    assert set(params["blocks"]) == {0, 1, 2} and params["blocks"][1]["more"]["kernel"].shape == (2, 6, 6)
    assert list(lora.slots(network))[-1] == "blocks.3.linear"


def test_a_scan_hands_each_layer_its_own_values():
    for depth in (1, 3):
        values = jnp.arange(1.0, depth + 1)
        network, x = Network(depth), jnp.ones((2, 6))
        out = scanned_layers.scan(network.blocks, lambda layer, x, value: 10 * x + value, x, values)
        np.testing.assert_allclose(out, {1: 11.0, 3: 1123.0}[depth])


def test_each_layer_of_a_scan_drops_for_itself():
    class Dropping(nnx.Module):
        def __call__(self, x):
            return drop(x, "test")

    layers = scanned_layers.stack([Dropping() for _ in range(3)])
    with noise(jax.random.key(0), test=0.5):
        out = scanned_layers.run_layers(layers, jnp.ones(4000))
    assert np.isin(out, [0.0, 8.0]).all()
    assert float((out > 0).mean()) == pytest.approx(1 / 8, abs=0.02)  # 1/2 if all three drew the same
    np.testing.assert_array_equal(scanned_layers.run_layers(layers, jnp.ones(4)), 1.0)


def test_adapters_count_the_layers_of_a_stack_and_take_them_together():
    network = nnx.eval_shape(lambda: Network(3))
    assert [name for name in lora.slots(network) if name.startswith("blocks")] == [
        f"blocks.{index}.linear" for index in range(3)
    ]
    with pytest.raises(
        ValueError, match=re.escape("'blocks.[01].linear' leaves out blocks.2.linear, but matches other")
    ):
        lora.attach(network, "blocks.[01].linear", rank=2, alpha=2)
    assert lora.attach(network, "linear", rank=2, alpha=2) == [f"blocks.{index}.linear" for index in range(3)]
    params = lora.init(network, jax.random.key(0), "kaiming")
    factors = params["blocks"]["linear"]
    assert factors["lora_A"].shape == (3, 6, 2) and factors["lora_B"].shape == (3, 2, 6)
    assert 0.9 / 6**0.5 < np.abs(factors["lora_A"]).max() <= 1 / 6**0.5
    keys = mapping.to_torch(network, params, kind=lora.LoRAParam)
    assert {f"blocks.{index}.linear.lora_A.weight" for index in range(3)} < set(keys)
