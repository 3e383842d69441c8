"""The transformer of diffusers' conditional UNet: self-attention, cross-attention on the prompt, feed-forward."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import scanned_layers
from imagereward_jax.models.layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    RngsLike,
    attention,
    gelu,
    gelu_tanh,
    merge_heads,
    split_heads,
)
from imagereward_jax.models.remat import call_with_remat, remat_mode
from imagereward_jax.models.sharding import shard_batch


class Placeholder(nnx.Module):
    """Takes up the list index of a PyTorch module without parameters (dropout)."""


class Attention(nnx.Module):
    """Multi-head attention to a context of width `context_features` (None: self-attention)."""

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        context_features: int | None = None,
        bias: bool = False,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        context_features = context_features or features
        self.heads, self.mode = heads, remat_mode(remat, "attention")
        self.to_q = Linear(features, features, bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(context_features, features, bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(context_features, features, bias=bias, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([Linear(features, features, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x: [B, T, features]; context: [B, S, context_features] or None. Returns [B, T, features]."""
        context = x if context is None else context
        query, key, value = (
            split_heads(project(tokens), self.heads)
            for project, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out[0](merge_heads(call_with_remat(attention, query, key, value, mode=self.mode)))


class GEGLU(nnx.Module):
    """Linear layer with two halves of outputs: the first times the exact GELU of the second."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.proj = Linear(in_features, 2 * out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(shard_batch(self.proj(x)), 2, axis=-1)
        return value * gelu(gate)


class TanhGELU(nnx.Module):
    """Linear layer and tanh-GELU."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.proj = Linear(in_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu_tanh(shard_batch(self.proj(x)))


class FeedForward(nnx.Module):
    """`activation` (`GEGLU` or `TanhGELU`) to four times the width, then a linear layer back."""

    def __init__(
        self,
        features: int,
        *,
        activation: type[GEGLU] | type[TanhGELU] = GEGLU,
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.net = nnx.List(
            [
                activation(features, 4 * features, dtype=dtype, rngs=rngs),
                Placeholder(),
                Linear(4 * features, features, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and feed-forward."""

    def __init__(
        self,
        features: int,
        heads: int,
        context_features: int,
        *,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.mode = remat_mode(remat, "blocks")
        options = {"remat": remat, "dtype": dtype, "rngs": rngs}
        self.norm1 = LayerNorm(features, dtype=dtype)
        self.attn1 = Attention(features, heads, **options)
        self.norm2 = LayerNorm(features, dtype=dtype)
        self.attn2 = Attention(features, heads, context_features=context_features, **options)
        self.norm3 = LayerNorm(features, dtype=dtype)
        self.ff = FeedForward(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x: [B, T, features]; context: [B, S, context_features]. Returns [B, T, features]."""
        return call_with_remat(self._forward, x, context, mode=self.mode, in_scan=scanned_layers.is_scanned(self))

    def _forward(self, x, context):
        x = shard_batch(x + self.attn1(self.norm1(x)))
        x = shard_batch(x + self.attn2(self.norm2(x), context))
        return shard_batch(x + self.ff(self.norm3(x)))


class Transformer2DModel(nnx.Module):
    """`depth` transformer blocks over the pixels of an image, around a skip connection."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_features: int,
        *,
        depth: int,
        linear: bool,
        groups: int,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.norm = GroupNorm(groups, channels, eps=1e-6, dtype=dtype)
        self.proj_in = _projection(channels, linear, dtype, rngs)
        options = {"remat": remat, "dtype": dtype, "rngs": rngs}
        blocks = [BasicTransformerBlock(channels, heads, context_features, **options) for _ in range(depth)]
        self.transformer_blocks = scanned_layers.stack(blocks) if blocks else None
        self.proj_out = _projection(channels, linear, dtype, rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x: [B, H, W, channels]; context: [B, S, context_features]. Returns [B, H, W, channels]."""
        batch, height, width, channels = x.shape
        # A 1 x 1 convolution and a linear layer are equivalent here; only the shape of their weights differs.
        tokens = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        if self.transformer_blocks is not None:
            tokens = scanned_layers.run_layers(self.transformer_blocks, tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))


def _projection(channels, linear, dtype, rngs):
    if linear:
        return Linear(channels, channels, dtype=dtype, rngs=rngs)
    return Conv(channels, channels, 1, dtype=dtype, rngs=rngs)
