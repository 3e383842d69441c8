"""Layers with kernels of one byte a weight, against the same arithmetic in NumPy, and what they leave as it is."""

import math

import child
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("qwix")

from imagereward_jax.models import lora, quantized
from imagereward_jax.models.layers import Conv, Linear
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.planning.counts import flops_by_dtype
from imagereward_jax.weights import mapping

LARGEST = {"int8": 127.5, "fp8": 448.0}
KINDS = tuple(LARGEST)


def scaled(array, axes, kind):
    """(numbers of the narrow dtype, as integers or float64; float32 scales of the largest magnitude over `axes`)."""
    scale = np.abs(array).max(axes, keepdims=True) / np.float32(LARGEST[kind])
    narrow = np.clip(array / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if kind == "int8":
        narrow = np.clip(np.rint(array / scale), -128, 127).astype(np.int64)  # rint: half to even
    return narrow, scale


def largest_positive(array, axes):
    """`array` with the signs turned where the largest magnitude over `axes` is of a negative number: it is scaled to
    -127.5, a tie that the last bit of the scale decides."""
    return np.where(array.max(axes, keepdims=True) < -array.min(axes, keepdims=True), -array, array)


def rescaled(total, *scales):
    total = total.astype(np.float32)
    for scale in scales:
        total = total * scale
    return total


def layer_and_params(build, kind):
    """(function of params and x, params, quantised params) of one layer with random weights."""
    holder = mapping.abstract(lambda: nnx.Dict(layer=build()))
    params = nnx.to_pure_dict(nnx.state(nnx.Dict(layer=build())))
    kernel = np.asarray(params["layer"]["kernel"])
    params["layer"]["kernel"] = largest_positive(kernel, tuple(range(kernel.ndim - 1)))
    graphdef = nnx.split(holder)[0]
    return (lambda params, x: nnx.merge(graphdef, params).layer(x)), params, quantized.quantize(holder, params, kind)


def assert_close(kind, got, expected):
    """int8: the same integers, times scales that may differ in their last bit; fp8: sums in another order too."""
    np.testing.assert_allclose(got, expected, rtol=0, atol={"int8": 5e-7, "fp8": 1e-6}[kind] * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_is_the_product_of_rounded_numbers_times_their_scales(kind):
    call, params, narrow = layer_and_params(lambda: Linear(48, 20, rngs=nnx.Rngs(0)), kind)
    x = np.random.default_rng(0).normal(size=(2, 5, 48)).astype(np.float32) * np.float32([[[1]], [[3]]])
    x = largest_positive(x, 2)
    rows, row_scale = scaled(x, 2, kind)
    kernel, kernel_scale = scaled(np.asarray(params["layer"]["kernel"]), 0, kind)
    expected = rescaled(rows @ kernel, row_scale, kernel_scale) + np.asarray(params["layer"]["bias"])
    assert_close(kind, call(narrow, x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_has_a_scale_for_each_image_and_output_channel(kind, stride):
    call, params, narrow = layer_and_params(lambda: Conv(6, 8, 3, stride=stride, padding=1, rngs=nnx.Rngs(0)), kind)
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 6)).astype(np.float32) * np.float32([[[[1]]], [[[3]]]])
    x = largest_positive(x, (1, 2, 3))
    images, image_scale = scaled(x, (1, 2, 3), kind)
    kernel, kernel_scale = scaled(np.asarray(params["layer"]["kernel"]), (0, 1, 2), kind)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = sum(padded[:, i : i + 6 : stride, j : j + 8 : stride] @ kernel[i, j] for i in range(3) for j in range(3))
    expected = rescaled(total, image_scale, kernel_scale) + np.asarray(params["layer"]["bias"])
    assert_close(kind, call(narrow, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_of_one_pixel_is_a_linear_layer(kind):
    call, params, narrow = layer_and_params(lambda: Conv(6, 8, 1, rngs=nnx.Rngs(0)), kind)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    x = largest_positive(x, 3)
    pixels, pixel_scale = scaled(x, 3, kind)
    kernel, kernel_scale = scaled(np.asarray(params["layer"]["kernel"][0, 0]), 0, kind)
    expected = rescaled(pixels @ kernel, pixel_scale, kernel_scale) + np.asarray(params["layer"]["bias"])
    assert_close(kind, call(narrow, x), expected)


@pytest.fixture(scope="module")
def tiny():
    """(pipeline, params, function of params: the UNet's output for two noisy images)."""
    pipeline, params = load_pipeline("tiny-shapes")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    cond = pipeline.encode_prompts(params, pipeline.tokenize(["a large red circle at the top left", ""]))
    return pipeline, params, jax.jit(lambda params: pipeline.denoise(params, x, jnp.array([700, 100]), cond))


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_trained_unet_stays_near_its_output_in_float32(tiny, kind, bound):
    """tiny-shapes: the root mean square of the difference is 1.2 % (int8) and 4.0 % (fp8) of the output's."""
    pipeline, params, denoise = tiny
    exact, narrow = denoise(params), denoise(pipeline.quantized(params, kind))
    error = float(jnp.linalg.norm(narrow - exact) / jnp.linalg.norm(exact))
    assert bound / 10 < error < bound, error


def test_all_kernels_are_quantised_but_those_of_the_time_and_of_the_first_and_last_convolution(tiny):
    pipeline, params, _ = tiny
    kernels, others = [], []
    leaves = jax.tree_util.tree_flatten_with_path(
        pipeline.quantized(params, "int8")["unet"], is_leaf=quantized.is_quantized
    )[0]
    for path, leaf in leaves:
        names = [str(part.key) for part in path]
        if quantized.is_quantized(leaf):
            assert leaf.qvalue.dtype == jnp.int8 and leaf.scale.dtype == jnp.float32
            kernels.append(".".join(names))
        elif names[-1] == "kernel":
            others.append(".".join(names))
    assert len(kernels) > 50 and "down_blocks.0.attentions.0.transformer_blocks.attn2.to_k.kernel" in kernels
    assert {name for name in others if not name.endswith("time_emb_proj.kernel")} == {
        "conv_in.kernel", "conv_out.kernel", "time_embedding.linear_1.kernel", "time_embedding.linear_2.kernel"
    }  # fmt: skip
    assert pipeline.quantized(params, "none") is params


def test_low_rank_products_stay_in_floating_point():
    """One int8 product, of the base, and A's and B's."""
    holder = mapping.abstract(lambda: nnx.Dict(layer=Linear(32, 16, rngs=nnx.Rngs(0))))
    lora.attach(holder, "layer", rank=2, alpha=2.0)
    graphdef, state = nnx.split(holder)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), nnx.to_pure_dict(state))
    narrow = quantized.quantize(holder, params, "int8")
    traced = jax.jit(lambda params, x: nnx.merge(graphdef, params).layer(x)).trace(narrow, jnp.ones((4, 32)))
    assert flops_by_dtype(traced.jaxpr) == {"int8": 2 * 4 * 32 * 16, "float32": 2 * 4 * (32 + 16) * 2}


ON_EIGHT_DEVICES = """
import functools, json, re
import jax, jax.numpy as jnp
from flax import nnx
from imagereward_jax.models import quantized
from imagereward_jax.models.layers import Keys, Linear
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.models.resnet import ResnetBlock2D
from imagereward_jax.models.transformer import Transformer2DModel
from imagereward_jax.training.mesh import batch_sharding, make_mesh, weight_shardings

class Both(nnx.Module):
    def __init__(self):
        rngs = Keys(nnx.Rngs(0))
        self.resnet = ResnetBlock2D(64, 64, time_features=256, groups=8, eps=1e-5, rngs=rngs)
        self.transformer = Transformer2DModel(64, 4, 128, depth=3, linear=True, groups=8, rngs=rngs)

    def __call__(self, x, time, context):
        return self.transformer(self.resnet(x, time), context)

network = Both()
layout, state = nnx.split(network)
params = nnx.to_pure_dict(state)
keys = jax.random.split(jax.random.key(0), 3)
inputs = [jax.random.normal(key, (8, *shape)) for key, shape in zip(keys, ((20, 20, 64), (256,), (77, 128)))]

def loop(mesh, narrow, params, steps, x, time, context):
    with batch_over(mesh):
        params = quantized.quantize(network, params, "int8") if narrow else params
        step = lambda _, x: nnx.merge(layout, params)(x, time, context)
        return jax.lax.fori_loop(0, steps, step, x)

exact = jax.jit(functools.partial(loop, None, False))(params, 2, *inputs)
one = jax.jit(functools.partial(loop, None, True))(params, 2, *inputs)
mesh = make_mesh(2, 4)
put = lambda leaf, sharding: jax.device_put(leaf, sharding)
placed = jax.tree.map(put, params, weight_shardings(mesh, params))
rows = [put(leaf, batch_sharding(mesh)) for leaf in inputs]
lowered = jax.jit(functools.partial(loop, mesh, True), out_shardings=batch_sharding(mesh)).lower(placed, 2, *rows)
compiled = lowered.compile()
eight = compiled(placed, 2, *rows)
gathered = []
for dtype, shape in re.findall(r"= \\(?(\\w+)\\[([\\d,]*)\\].*? all-gather(?:-start)?\\(", compiled.as_text()):
    gathered.append([dtype, [int(size) for size in shape.split(",") if size]])

holder = nnx.Dict(layer=Linear(512, 64, rngs=Keys(nnx.Rngs(0))))  # split along the axis that is summed over
layer_layout, layer_state = nnx.split(holder)
layer_params = nnx.to_pure_dict(layer_state)
x = jax.random.normal(keys[0], (8, 512))

def layer(mesh, params, x):
    with batch_over(mesh):
        return nnx.merge(layer_layout, quantized.quantize(holder, params, "int8")).layer(x)

def error(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

layers = [jax.jit(functools.partial(layer, None))(layer_params, x), jax.jit(functools.partial(layer, mesh))(
    jax.tree.map(put, layer_params, weight_shardings(mesh, layer_params)), put(x, batch_sharding(mesh)))]
kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1 and leaf.size >= 2**14]
print(json.dumps({
    "gathered": gathered, "kernels": [list(leaf.shape) for leaf in kernels],
    "layer": error(*map(jax.device_get, layers)), "one": error(one, exact),
    "eight": error(jax.device_get(eight), exact),
}))
"""


def test_one_byte_a_weight_is_gathered():
    """A residual block and three transformer blocks in a loop on 8 devices, fsdp 4: what is gathered is int8, but for
    the time's projection, which stays float32. A layer alone gives what it gives on one device, within 1e-6. Of all of
    them, where a last bit decides between two integers, the result is as far from float32's as on one device is."""
    found = child.run(ON_EIGHT_DEVICES, devices=8)
    narrow = [shape for dtype, shape in found["gathered"] if dtype == "s8"]
    assert len(narrow) >= len(found["kernels"]) - 1, found
    # but for vectors: the scales, once before the loop
    others = {tuple(shape) for dtype, shape in found["gathered"] if dtype != "s8" and max(shape) < math.prod(shape[1:])}
    assert others <= {(256, 64)}, found["gathered"]
    assert found["layer"] < 1e-6, found["layer"]
    assert 0.001 < found["one"] < 0.02 and abs(found["eight"] / found["one"] - 1) < 0.02, found
