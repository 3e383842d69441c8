"""Kernels of one byte per weight, int8 or float8_e4m3fn, for products without gradient; computed by qwix.

`quantize` replaces arrays of a network's parameters by such kernels, once per set of weights. Only `Linear` and `Conv`
handle them. Parameters that carry gradient are never quantised.

Weights are scaled by the largest magnitude of each output channel; activations by that of each token or pixel, or of
each image if a convolution mixes pixels. int8 products are summed in int32, float8 ones in float32; the scales are
float32. Not quantised are attention's own products, norms, low-rank (LoRA) products and the layers that a
family keeps precise (`KEPT_OF_UNET`, `KEPT_OF_MMDIT`): the first and the last, whose few channels decide about single
pixels, and those of the time embedding, one row per image.

Programs for TPU v5e and NVIDIA H200 contain int8 and float8 products and convolutions; whether they are faster depends
on the hardware's units (v5e: int8).
"""

import functools
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models import scanned_layers
from imagereward_jax.models.lora import LoRASlot
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.sharding import gather_weight, replicate, shard_weight

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
KINDS = ("none", *DTYPES)
KEPT_OF_UNET = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")
KEPT_OF_MMDIT = ("pos_embed", "proj_out", "time_text_embed", "norm1", "norm1_context", "norm_out")


def quantize(
    network: nnx.Module, params: dict[str, Any], kind: str, kept: Collection[str] = KEPT_OF_UNET
) -> dict[str, Any]:
    """Quantises the kernels of every `Linear` and `Conv` of an abstract network, except `kept`, to `qwix.QArray`.

    Each device quantises its own shard of a weight, so that later all-gathers move one byte per weight.

    Args:
        kind: "int8" or "fp8". kept: names of layers or their parents that are not quantised.
    """
    stacks, kernels = scanned_layers.stacks_of(network), {}
    for path, layer in nnx.iter_modules(network):
        if not isinstance(layer, LoRASlot) or set(path) & set(kept):
            continue
        kernel = functools.reduce(operator.getitem, path, params)["kernel"]
        stacked = scanned_layers.numbered(path, stacks)[0][1] is not None
        own_scale = (0, kernel.ndim - 1) if stacked else (kernel.ndim - 1,)
        quantized = _quantize(kernel, DTYPES[kind], own_scale)
        quantized = quantized.replace(qvalue=shard_weight(quantized.qvalue), scale=replicate(quantized.scale))
        own = functools.reduce(lambda inner, name: {name: inner}, reversed(path), {"kernel": quantized})
        kernels = join(kernels, own)
    return join(params, kernels)


def is_quantized(kernel: Any) -> bool:
    """Whether a kernel was made by `quantize`."""
    return hasattr(kernel, "qvalue")


def linear(x: jax.Array, kernel: Any) -> jax.Array:
    """`x @ kernel` over the last axis, in the dtype of `x` [..., in]; kernel: quantised, [in, out]."""
    import qwix

    last = x.ndim - 1
    rows = _quantize(x, kernel.qvalue.dtype, range(last))
    return qwix.dot_general(rows, _whole(kernel), (((last,), (0,)), ((), ()))).astype(x.dtype)


def conv(x: jax.Array, kernel: Any, stride: int, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """2-D convolution in the dtype of `x` [B, H, W, in]; kernel: quantised, [k, k, in, out].

    Args:
        stride: along both axes. padding: ((top, bottom), (left, right)).
    """
    import qwix

    if kernel.shape[:2] == (1, 1) and stride == 1 and not any(map(any, padding)):
        return linear(x, kernel[0, 0])  # a scale per pixel
    images = _quantize(x, kernel.qvalue.dtype, (0,))
    layout = ("NHWC", "HWIO", "NHWC")
    y = qwix.conv_general_dilated(images, _whole(kernel), (stride, stride), padding, dimension_numbers=layout)
    return y.astype(x.dtype)


def _quantize(array, dtype, own_scale):
    """Quantises an array; own_scale: axes along which every index has a scale of its own."""
    import qwix

    return qwix.quantize(array.astype(jnp.float32), dtype, channelwise_axes=tuple(own_scale))


def _whole(kernel):
    return kernel.replace(qvalue=gather_weight(kernel.qvalue))
