"""Layers shared by all networks: arrays in, arrays out, channels last.

Attribute names follow the PyTorch checkpoints. `torch_names` of each layer gives the names and axis order of its
parameters there; `imagereward_jax.weights.mapping` needs nothing else to convert a network.

Parameters are created in float32 and may be stored in any dtype; a layer computes in its own `dtype`.
Normalisation statistics and softmax are always float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import cpu_convolution, quantized
from imagereward_jax.models.attention import attention
from imagereward_jax.models.cpu_convolution import Padding
from imagereward_jax.models.hardware import current_platform, precision
from imagereward_jax.models.lora import LoRASlot
from imagereward_jax.models.sharding import gather_weight, shard_batch

__all__ = [
    "Conv",
    "Embedding",
    "GroupNorm",
    "Keys",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "RngsLike",
    "attention",
    "gelu",
    "gelu_tanh",
    "merge_heads",
    "normalise",
    "quick_gelu",
    "split_heads",
]


def uniform_init(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Draws PyTorch's default for Linear and Conv: uniform in +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Keys:
    """Random keys for the parameters of a network, counted in Python.

    `nnx.Rngs` counts in an array; under a trace (`mapping.abstract`) its time grows with the square of the number of
    keys: 20 s for SDXL's UNet, 1 s with this class.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.key, self.count = rngs.params(), 0

    def params(self) -> jax.Array:
        """Returns the next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


RngsLike = nnx.Rngs | Keys


class KernelLayer(LoRASlot, nnx.Module):
    """Base of `Linear` and `Conv`: casts, bias and LoRA around the product of the subclass, quantised or not."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        kernel = self.kernel[...]
        if quantized.is_quantized(kernel):
            y = self._quantized_product(x, kernel)
        else:
            y = self._product(x, gather_weight(kernel.astype(self.dtype)))
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        return y if self.lora_A is None else y + self._low_rank(x, self._product, precision(self.dtype))


class Linear(KernelLayer):
    """`x @ kernel + bias` over the last axis. kernel: [in_features, out_features]."""

    torch_names = {
        "kernel": ("weight", (1, 0)),
        "bias": ("bias", None),
        "lora_A": ("lora_A.weight", (1, 0)),
        "lora_B": ("lora_B.weight", (1, 0)),
    }

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32, rngs: RngsLike
    ) -> None:
        self.dtype = dtype
        self.kernel = nnx.Param(uniform_init(rngs.params(), (in_features, out_features), in_features))
        self.bias = nnx.Param(uniform_init(rngs.params(), (out_features,), in_features)) if bias else None

    def _product(self, x, kernel):
        return jnp.matmul(x, kernel, precision=precision(self.dtype))

    def _quantized_product(self, x, kernel):
        return quantized.linear(x, kernel)


class Conv(KernelLayer):
    """2-D convolution. x: [B, H, W, C_in]; kernel: [k, k, C_in, C_out].

    Args:
        padding: zero pixels on every side, or ((top, bottom), (left, right)).
    """

    torch_names = {
        "kernel": ("weight", (3, 2, 0, 1)),
        "bias": ("bias", None),
        "lora_A": ("lora_A.weight", (3, 2, 0, 1)),
        "lora_B": ("lora_B.weight", (3, 2, 0, 1)),
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | Padding = 0,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.dtype = dtype
        self.stride = stride
        self.padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        fan_in = in_channels * kernel_size**2
        self.kernel = nnx.Param(
            uniform_init(rngs.params(), (kernel_size, kernel_size, in_channels, out_channels), fan_in)
        )
        self.bias = nnx.Param(uniform_init(rngs.params(), (out_channels,), fan_in)) if bias else None

    def _product(self, x, kernel):
        if current_platform() == "cpu":
            return cpu_convolution.conv(x, kernel, self.stride, self.padding, precision(self.dtype))
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision(self.dtype),
        )

    def _quantized_product(self, x, kernel):
        return quantized.conv(x, kernel, self.stride, self.padding)


class Embedding(nnx.Module):
    """Rows of `embedding` [num_embeddings, features] by integer index."""

    torch_names = {"embedding": ("weight", None)}

    def __init__(self, num_embeddings: int, features: int, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.dtype = dtype
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_embeddings, features)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return shard_batch(gather_weight(jnp.asarray(self.embedding[...]))[ids].astype(self.dtype))


def normalise(x: jax.Array, eps: float) -> jax.Array:
    """Shifts and scales vectors over the last axis to mean 0 and variance 1: float32, the shape of `x`."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    torch_names = {"scale": ("weight", None), "bias": ("bias", None)}

    def __init__(self, features: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32) -> None:
        self.dtype, self.eps = dtype, eps
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = normalise(x, self.eps)
        return (x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class RMSNorm(nnx.Module):
    """Scales vectors over the last axis by their root mean square (arXiv 1910.07467), computed in float32."""

    torch_names = {"scale": ("weight", None)}

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike = jnp.float32) -> None:
        self.dtype, self.eps = dtype, eps
        self.scale = nnx.Param(jnp.ones((features,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over space and the channels of a group, computed in float32. x: [B, ..., C]."""

    torch_names = {"scale": ("weight", None), "bias": ("bias", None)}

    def __init__(self, groups: int, features: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32) -> None:
        if features % groups:
            raise ValueError(f"norm_num_groups={groups} does not divide {features} channels")
        self.dtype, self.eps, self.groups = dtype, eps, groups
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Reduces over space first, per channel, so that the large array is never reshaped to groups.
        space = tuple(range(1, x.ndim - 1))
        x = x.astype(jnp.float32)
        mean = self._over_group(x.mean(space, keepdims=True))
        variance = self._over_group(jnp.square(x - mean).mean(space, keepdims=True))
        x = (x - mean) * (jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32))
        return (x + self.bias[...].astype(jnp.float32)).astype(self.dtype)

    def _over_group(self, x):
        """Replaces each channel's entry of [..., C] by the mean over its group."""
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by the tanh formula, "gelu-approximate" and "gelu_new" of PyTorch's models."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def unit(x: jax.Array) -> jax.Array:
    """Normalises vectors over the last axis to length 1, in float32, like PyTorch's `normalize` (eps 1e-12)."""
    x = x.astype(jnp.float32)
    # The lower bound is inside the square root, so that the gradient is finite at zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, heads * head_dim] -> [B, T, heads, head_dim]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, heads, head_dim] -> [B, T, heads * head_dim]."""
    return x.reshape(*x.shape[:-2], -1)
