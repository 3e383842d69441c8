"""CLIP's text encoder, after transformers' `CLIPTextModel`; attributes are named as in the published checkpoints."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
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
    LayerNorm,
    Linear,
    RngsLike,
    attention,
    gelu,
    merge_heads,
    quick_gelu,
    split_heads,
)
from imagereward_jax.models.sharding import shard_batch

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
_ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_FIXED = {"attention_dropout": (0.0,), "dropout": (0.0,), "model_type": ("clip_text_model",)}

# config.json of published encoders, without default values: of Stable Diffusion 1.x; the first of SD 3, whose
# projection is the identity, stored as a matrix; the second of SDXL and SD 3.
VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
VIT_L_PROJECTED = VIT_L | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 768}
VIT_BIG_G = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """config.json of a CLIP text encoder; the defaults are those of transformers."""

    architectures: tuple[str, ...] = ("CLIPTextModel",)
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    def __post_init__(self):
        check_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings",
        )  # fmt: skip
        check_choice(type(self), "hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        for name in self.architectures:
            check_choice(type(self), "architectures", name, _ARCHITECTURES)
        if not 0 <= self.eos_token_id < self.vocab_size:  # no prompt would have an end
            raise ValueError(
                f"CLIPTextConfig: eos_token_id={self.eos_token_id!r} should be at least 0 and less than "
                f"vocab_size={self.vocab_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPTextConfig: num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLIPTextConfig":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        return read_config(cls, values, fixed=_FIXED, ignored=TRANSFORMERS_FIELDS)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as transformers reads it."""
        return {"model_type": "clip_text_model", **write_config(self)}


class CLIPTextOutput(NamedTuple):
    """Outputs of the text encoder for input_ids [B, T].

    last_hidden_state: [B, T, hidden_size], after the final norm (Stable Diffusion 1.x).
    penultimate_hidden_state: [B, T, hidden_size], the input of the last layer, without the final norm (SDXL, SD 3).
    pooled: [B, hidden_size], `last_hidden_state` at the end-of-text token; [B, projection_dim] with a projection.
    """

    last_hidden_state: jax.Array
    penultimate_hidden_state: jax.Array
    pooled: jax.Array


class CLIPTextEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[1]))


class TowerConfig(Protocol):
    """Sizes of a stack of CLIP's layers, of text or of images."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class CLIPAttention(nnx.Module):
    """Multi-head self-attention; `causal` for text, bidirectional for images."""

    def __init__(self, config: TowerConfig, *, causal: bool = True, dtype: DTypeLike, rngs: RngsLike) -> None:
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(width, width, dtype=dtype, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)) if self.causal else None
        return self.out_proj(merge_heads(attention(query, key, value, mask=mask)))


class CLIPMLP(nnx.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, config: TowerConfig, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: TowerConfig, *, causal: bool = True, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = CLIPAttention(config, causal=causal, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = CLIPMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = shard_batch(x + self.self_attn(self.layer_norm1(x)))
        return shard_batch(x + self.mlp(self.layer_norm2(x)))


class CLIPEncoder(nnx.Module):
    """Stack of layers."""

    def __init__(self, config: TowerConfig, *, causal: bool = True, dtype: DTypeLike, rngs: RngsLike) -> None:
        depth = config.num_hidden_layers
        layers = [CLIPEncoderLayer(config, causal=causal, dtype=dtype, rngs=rngs) for _ in range(depth)]
        self.layers = scanned_layers.stack(layers)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the outputs of the last layer and of the one before."""
        return scanned_layers.scan(self.layers, lambda layer, outputs: (layer(outputs[0]), outputs[0]), (x, x))


class CLIPTextTransformer(nnx.Module):
    """CLIP's text encoder without the projection."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, input_ids: jax.Array) -> CLIPTextOutput:
        last, penultimate = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(last)
        # Checkpoints from before mid-2023 wrongly state eos_token_id 2; the real one is the vocabulary's largest id.
        scores = input_ids if self.eos_token_id == 2 else input_ids == self.eos_token_id
        position = jnp.argmax(scores, axis=-1)
        pooled = jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(last, penultimate, pooled)


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder without projection: Stable Diffusion 1.x, and the first one of SDXL.

    Args:
        config: sizes.
        dtype: of the computation and the outputs; norms and attention weights are always float32.
    """

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.config = config
        self.text_model = CLIPTextTransformer(config, dtype=dtype, rngs=Keys(rngs))

    def __call__(self, input_ids: jax.Array) -> CLIPTextOutput:
        """Encodes input_ids: int [B, T], T <= max_position_embeddings.

        Raises:
            ValueError: `input_ids` has another shape or dtype.
        """
        longest = self.config.max_position_embeddings
        integers = jnp.issubdtype(input_ids.dtype, jnp.integer)
        if input_ids.ndim != 2 or input_ids.shape[1] > longest or not integers:
            raise ValueError(
                f"input_ids should be integers [B, T] with T <= {longest}, not {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        return self.text_model(jnp.asarray(input_ids))


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP's text encoder with a linear projection of the pooled output: the second of SDXL, the first two of SD 3."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: jax.Array) -> CLIPTextOutput:
        output = super().__call__(input_ids)
        return output._replace(pooled=self.text_projection(output.pooled))
