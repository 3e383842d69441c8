"""T5's encoder, version 1.1 (arXiv 1910.10683, 2002.05202), after transformers' `T5EncoderModel`.

Attributes are named as in the published checkpoints. Half precision is for the products alone: the sum over the layers
grows beyond float16, and past the precision of bfloat16, so it is always float32, as norms and softmax are.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import scanned_layers
from imagereward_jax.models.config import (
    TRANSFORMERS_FIELDS,
    check_choice,
    check_positive,
    read_config,
    write_config,
)
from imagereward_jax.models.layers import (
    Embedding,
    Keys,
    Linear,
    RMSNorm,
    RngsLike,
    attention,
    gelu_tanh,
    merge_heads,
    split_heads,
)
from imagereward_jax.models.sharding import shard_batch

_FIXED = {
    "dense_act_fn": ("gelu_new",),
    "is_decoder": (False,),
    "is_gated_act": (True,),
    "model_type": ("t5",),
}
# Settings of the decoder, of training and of text generation.
_IGNORED = (
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_word_embeddings",
    "use_cache",
)

# config.json of the third text encoder of Stable Diffusion 3, without default values.
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """config.json of a T5 encoder; the defaults are those of transformers, except for `feed_forward_proj`.

    `feed_forward_proj` has no default: transformers' is the original T5, "relu", and only version 1.1 is implemented.
    """

    feed_forward_proj: str
    architectures: tuple[str, ...] = ("T5EncoderModel",)
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        check_positive(
            self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "relative_attention_max_distance",
        )  # fmt: skip
        check_choice(type(self), "feed_forward_proj", self.feed_forward_proj, ("gated-gelu",))
        for name in self.architectures:
            check_choice(type(self), "architectures", name, ("T5EncoderModel",))
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"T5Config: relative_attention_num_buckets={buckets} should be a multiple of 4, and "
                f"relative_attention_max_distance={distance} more than a quarter of it"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "T5Config":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        values = {"feed_forward_proj": "relu", **values}
        return read_config(cls, values, fixed=_FIXED, ignored=(*TRANSFORMERS_FIELDS, *_IGNORED))

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as transformers reads it."""
        return {"model_type": "t5", "tie_word_embeddings": False, **write_config(self)}


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each pair of positions, int32 [length (query), length (key)].

    Half of the buckets are for keys after the query. Of each half, one half holds a distance each; the other grows
    logarithmically up to `max_distance`, from which on all distances share the last bucket.
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # In float32, as transformers computes it: the truncation below would show another rounding.
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class T5Attention(nnx.Module):
    """Multi-head self-attention whose scores are not scaled; `bias` depends on the distance of query and key."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        options = {"dtype": dtype, "rngs": rngs}
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, **options)
        self.k = _linear(width, inner, width**-0.5, **options)
        self.v = _linear(width, inner, width**-0.5, **options)
        self.o = _linear(inner, width, inner**-0.5, **options)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x: [B, T, d_model]; bias: [1, heads, T, T]; mask: bool [B, 1, 1, T] or None. Returns [B, T, d_model]."""
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        return self.o(merge_heads(attention(query, key, value, mask=mask, bias=bias, scale=1.0)))


class T5LayerSelfAttention(nnx.Module):
    """Pre-norm self-attention around a skip connection."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.SelfAttention = T5Attention(config, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        return shard_batch(x + self.SelfAttention(self.layer_norm(x), bias, mask))


class T5DenseGatedActDense(nnx.Module):
    """Linear layer times the tanh-GELU of another, then a linear layer back, which overflows float16."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        width, inner = config.d_model, config.d_ff
        self.wi_0 = _linear(width, inner, width**-0.5, dtype=dtype, rngs=rngs)
        self.wi_1 = _linear(width, inner, width**-0.5, dtype=dtype, rngs=rngs)
        wide = jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype
        self.wo = _linear(inner, width, inner**-0.5, dtype=wide, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))


class T5LayerFF(nnx.Module):
    """Pre-norm feed-forward around a skip connection."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.DenseReluDense = T5DenseGatedActDense(config, dtype=dtype, rngs=rngs)
        self.layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return shard_batch(x + self.DenseReluDense(self.layer_norm(x)))


class T5Block(nnx.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        options = {"dtype": dtype, "rngs": rngs}
        self.layer = nnx.List([T5LayerSelfAttention(config, **options), T5LayerFF(config, **options)])

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x: float32 [B, T, d_model]; returns the same shape and dtype."""
        return self.layer[1](self.layer[0](x, bias, mask))


class T5Stack(nnx.Module):
    """The blocks, the biases by distance that all of them share, and the final norm.

    relative_attention_bias: [buckets, heads]. Checkpoints keep it in the first block, which a stack of equal blocks
    cannot.
    """

    torch_names = {
        "relative_attention_bias": ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", None),
    }

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.buckets, self.max_distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        table = jax.random.normal(rngs.params(), (self.buckets, config.num_heads))
        self.relative_attention_bias = nnx.Param(config.d_model**-0.5 * table)
        self.block = scanned_layers.stack([T5Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """x: [B, T, d_model]; mask: bool [B, T] or None. Returns [B, T, d_model] in the layers' dtype."""
        mask = None if mask is None else mask[:, None, None, :]
        bias = self._position_bias(x.shape[1])
        return self.final_layer_norm(scanned_layers.run_layers(self.block, x.astype(jnp.float32), bias, mask))

    def _position_bias(self, length):
        """[1, heads, length, length] in float32."""
        table = self.relative_attention_bias[...].astype(jnp.float32)
        return table[relative_buckets(length, self.buckets, self.max_distance)].transpose(2, 0, 1)[None]


class T5EncoderModel(nnx.Module):
    """T5's encoder, version 1.1: the third text encoder of Stable Diffusion 3.

    Args:
        config: sizes.
        dtype: of the products and the outputs. The residual stream, norms and attention weights are always float32;
            with float16, so is the product that overflows in it.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.config = config
        rngs = Keys(rngs)
        self.shared = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        self.shared.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))
        self.encoder = T5Stack(config, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encodes tokens.

        Args:
            input_ids: int [B, T], of any length.
            mask: [B, T], 1 or True for tokens that are attended to; None for all, padding included, which Stable
                Diffusion 3 was trained with.

        Returns:
            [B, T, d_model] in `dtype`.

        Raises:
            ValueError: `input_ids` or `mask` has another shape or dtype.
        """
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise ValueError(f"input_ids should be integers [B, T], not {input_ids.dtype} {list(input_ids.shape)}")
        if mask is not None:
            if mask.shape != input_ids.shape:
                raise ValueError(f"mask should be {list(input_ids.shape)}, as input_ids, not {list(mask.shape)}")
            mask = jnp.asarray(mask).astype(bool)
        return self.encoder(self.shared(jnp.asarray(input_ids)), mask)


def _linear(in_features, out_features, std, *, dtype, rngs):
    """A linear layer without bias, initialised as T5's."""
    layer = Linear(in_features, out_features, bias=False, dtype=dtype, rngs=rngs)
    layer.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
    return layer
