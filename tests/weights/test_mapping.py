"""A PyTorch layer and ours, given the same tensors through the mapping, compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from imagereward_jax.models import layers
from imagereward_jax.models.hardware import target_platform
from imagereward_jax.weights import mapping

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def channels_first(x):
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def make(kind, *args, **kwargs):
    return lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0))


def padded(convolution, padding):
    """A PyTorch convolution after zero padding of ((top, bottom), (left, right))."""
    (top, bottom), (left, right) = padding
    return torch.nn.Sequential(torch.nn.ZeroPad2d((left, right, top, bottom)), convolution)


IMAGES = RNG.standard_normal((2, 7, 9, 6)).astype(np.float32)
TOKENS = RNG.standard_normal((2, 5, 6)).astype(np.float32)
IDS = RNG.integers(0, 11, (2, 5))
ASYMMETRIC = ((0, 1), (2, 0))
CASES = {
    "linear": (make(layers.Linear, 6, 4), lambda: torch.nn.Linear(6, 4), TOKENS),
    "linear without bias": (make(layers.Linear, 6, 4, bias=False), lambda: torch.nn.Linear(6, 4, bias=False), TOKENS),
    "conv 1x1": (make(layers.Conv, 6, 4, 1), lambda: torch.nn.Conv2d(6, 4, 1), IMAGES),
    "conv 3x3": (make(layers.Conv, 6, 4, 3, padding=1), lambda: torch.nn.Conv2d(6, 4, 3, padding=1), IMAGES),
    "conv without bias": (make(layers.Conv, 6, 4, 3, bias=False), lambda: torch.nn.Conv2d(6, 4, 3, bias=False), IMAGES),
    "conv with stride": (
        make(layers.Conv, 6, 4, 3, stride=2, padding=1),
        lambda: torch.nn.Conv2d(6, 4, 3, stride=2, padding=1),
        IMAGES,
    ),
    "conv padded unevenly": (
        make(layers.Conv, 6, 4, 3, stride=2, padding=ASYMMETRIC),
        lambda: torch.nn.Conv2d(6, 4, 3, stride=2),
        IMAGES,
    ),
    "layer norm": (lambda: layers.LayerNorm(6, eps=1e-3), lambda: torch.nn.LayerNorm(6, eps=1e-3), TOKENS),
    "group norm": (lambda: layers.GroupNorm(3, 6, eps=1e-3), lambda: torch.nn.GroupNorm(3, 6, eps=1e-3), IMAGES),
    "embedding": (make(layers.Embedding, 11, 6), lambda: torch.nn.Embedding(11, 6), IDS),
}


def random_state(layer):
    return {
        key: RNG.standard_normal(tuple(value.shape)).astype(np.float32) for key, value in layer.state_dict().items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_outputs_agree(case, platform):
    """To 1e-5 of the largest output, with the convolution of CPUs and with the compiler's own."""
    build, build_torch, inputs = CASES[case]
    reference = build_torch()
    tensors = random_state(reference)
    reference.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()})
    if case == "conv padded unevenly":
        reference = padded(reference, ASYMMETRIC)
    wanted = channels_last(reference(torch.tensor(channels_first(inputs))).detach().numpy())

    layer = mapping.abstract(build)
    graphdef, _ = nnx.split(layer)
    with target_platform(platform):
        output = nnx.merge(graphdef, mapping.from_torch(layer, tensors))(inputs)
    assert output.shape == wanted.shape
    assert np.abs(output - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_exact(case):
    build, build_torch, _ = CASES[case]
    tensors = random_state(build_torch())
    layer = mapping.abstract(build)
    back = mapping.to_torch(layer, mapping.from_torch(layer, tensors))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


class Network(nnx.Module):
    """Nested, with a list and a bare parameter."""

    def __init__(self, rngs):
        self.blocks = nnx.List([layers.Linear(3, 4, rngs=rngs), layers.Conv(2, 5, 3, rngs=rngs)])
        self.norm = layers.LayerNorm(4)
        self.class_embedding = nnx.Param(jax.numpy.zeros((1, 4)))


SHAPES = {
    "blocks.0.weight": (4, 3),
    "blocks.0.bias": (4,),
    "blocks.1.weight": (5, 2, 3, 3),
    "blocks.1.bias": (5,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "class_embedding": (1, 4),
}


@pytest.fixture
def network():
    return mapping.abstract(lambda: Network(nnx.Rngs(0)))


@pytest.fixture
def tensors():
    return {key: RNG.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def test_keys_are_pytorch_names(network):
    assert {key: leaf.torch_shape for key, leaf in mapping.torch_layout(network).items()} == SHAPES


def test_every_difference_is_listed(network, tensors):
    del tensors["norm.bias"], tensors["blocks.0.weight"]
    tensors |= {"extra.weight": np.zeros(1), "blocks.1.weight": np.zeros((5, 2, 1, 1))}
    with pytest.raises(mapping.CheckpointMismatch) as error:
        mapping.from_torch(network, tensors, what="some/file")
    message = str(error.value)
    assert message.startswith("some/file does not fit the network")
    assert "2 missing:\n    blocks.0.weight\n    norm.bias" in message
    assert "1 unexpected:\n    extra.weight" in message
    assert "blocks.1.weight: (5, 2, 1, 1) in the checkpoint, (5, 2, 3, 3) in the network" in message


def test_a_kernel_of_transposed_shape_is_refused(network, tensors):
    """Linear(3, 4) given [3, 4], which is our own layout, not PyTorch's."""
    tensors["blocks.0.weight"] = tensors["blocks.0.weight"].T
    with pytest.raises(mapping.CheckpointMismatch, match=r"blocks\.0\.weight: \(3, 4\) .*, \(4, 3\)"):
        mapping.from_torch(network, tensors)


def test_ignored_keys_and_dtype(network, tensors):
    tensors["position_ids"] = np.arange(3)
    params = mapping.from_torch(network, tensors, ignore=("position_ids$",), dtype=jax.numpy.bfloat16)
    assert {array.dtype.name for array in jax.tree.leaves(params)} == {"bfloat16"}
    with pytest.raises(mapping.CheckpointMismatch, match="position_ids"):
        mapping.from_torch(network, tensors)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda array: np.where(array == array.max(), np.nan, array), "has values that are NaN or infinite"),
        (lambda array: np.where(array == array.max(), np.inf, array), "has values that are NaN or infinite"),
        (lambda array: array.astype(np.int8), "int8 in the checkpoint, floating point in the network"),
        (lambda array: array > 0, "bool in the checkpoint, floating point in the network"),
    ],
)
def test_values_that_are_no_weights_are_named(network, tensors, spoil, message):
    """Whether they are read to NumPy or straight to a device."""
    key = next(key for key, array in tensors.items() if array.ndim > 1)
    spoilt = {**tensors, key: spoil(np.asarray(tensors[key], np.float32))}
    with pytest.raises(mapping.CheckpointMismatch, match=rf"(?s)the file.*{key}.*({message})"):
        mapping.from_torch(network, spoilt, what="the file")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=here), mapping.params_of(network)
    )
    with pytest.raises(mapping.CheckpointMismatch, match=rf"(?s)the file.*{key}.*({message})"):
        mapping.from_torch(network, spoilt, what="the file", target=target)
