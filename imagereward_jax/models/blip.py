"""The ImageReward network: BLIP's image-grounded text encoder and a scalar head. Arrays in, arrays out.

A vision transformer (timm's key names) reads the image; a BERT encoder with cross-attention in every layer
(post-norm) reads the prompt while looking at the image; an MLP turns the feature of the first token into the
score. Follows ImageReward (arXiv 2304.05977) and BLIP (arXiv 2201.12086). Attribute names are the keys of
`ImageReward.pt`, so `imagereward_jax.weights.mapping` converts it without a table.

Inside `dropout.noise` it trains like the original. The rates: "text" is BERT's dropout, "path" the drop path of the
last vision block (0 in the first block, linear in between), "head" the three rates of the head.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import layers
from imagereward_jax.models.blip_config import BlipScoreConfig, ImageRewardConfig, TextConfig, VisionConfig
from imagereward_jax.models.dropout import drop, drops
from imagereward_jax.models.remat import call_with_remat, check_remat, remat_mode
from imagereward_jax.models.sharding import shard_batch

INIT_STD = 0.02  # of every weight matrix at initialisation


class Linear(layers.Linear):
    """Linear layer with N(0, std) weights and zero biases at initialisation, as in ViT, BERT and the head."""

    def __init__(
        self, in_features: int, out_features: int, *, std: float = INIT_STD, dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.dtype = dtype
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,)))


class PatchEmbed(nnx.Module):
    """Patches of pixels as tokens: [B, S, S, 3] -> [B, patches, width], in row order."""

    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        size = config.patch_size
        self.proj = layers.Conv(3, config.width, size, stride=size, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.proj(pixels)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, remat: str, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.heads, self.mode = config.heads, remat_mode(remat, "attention")
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype, rngs=rngs)
        self.proj = Linear(config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (layers.split_heads(part, self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(layers.merge_heads(call_with_remat(layers.attention, query, key, value, mode=self.mode)))


class VisionMlp(nnx.Module):
    def __init__(self, config: VisionConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.fc1 = Linear(config.width, config.mlp_ratio * config.width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_ratio * config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(layers.gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block. path_scale: factor of its drop path rate, 0 to 1."""

    def __init__(
        self, config: VisionConfig, path_scale: float, *, remat: str, dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.path_scale, self.mode = path_scale, remat_mode(remat, "blocks")
        self.norm1 = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)
        self.attn = VisionAttention(config, remat=remat, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = VisionMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return call_with_remat(self._forward, x, mode=self.mode)

    def _forward(self, x):
        drop_path = functools.partial(drop, kind="path", scale=self.path_scale, per_sample=True)
        x = shard_batch(x + drop_path(self.attn(self.norm1(x))))
        return shard_batch(x + drop_path(self.mlp(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """Normalised pixels [B, S, S, 3] -> tokens [B, 1 + patches, width], class token first."""

    def __init__(self, config: VisionConfig, *, remat: str = "none", dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.dtype = dtype
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.tokens, config.width)))
        last = max(1, config.depth - 1)
        options = {"remat": remat, "dtype": dtype, "rngs": rngs}
        self.blocks = nnx.List([VisionBlock(config, i / last, **options) for i in range(config.depth)])
        self.norm = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = self.patch_embed(pixels)
        cls_token = self.cls_token[...].astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + self.pos_embed[...].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextEmbeddings(nnx.Module):
    """Token ids [B, L] -> [B, L, hidden]; BLIP's BERT has no segment embedding."""

    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.word_embeddings = layers.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.position_embeddings = layers.Embedding(
            config.max_position_embeddings, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.LayerNorm = layers.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1]))
        return drop(self.LayerNorm(x), "text")


class AttentionCore(nnx.Module):
    """Multi-head attention from `x` [B, L, hidden] to `source` [B, S, source_width]."""

    def __init__(
        self, config: TextConfig, source_width: int, *, remat: str, dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.heads, self.mode = config.num_attention_heads, remat_mode(remat, "attention")
        self.query = Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.key = Linear(source_width, config.hidden_size, dtype=dtype, rngs=rngs)
        self.value = Linear(source_width, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None) -> jax.Array:
        query, key, value = (
            layers.split_heads(part, self.heads) for part in (self.query(x), self.key(source), self.value(source))
        )
        drop_weights = functools.partial(drop, kind="text") if drops("text") else None

        def attend(query, key, value, mask):
            return layers.attention(query, key, value, mask=mask, drop=drop_weights)

        return layers.merge_heads(call_with_remat(attend, query, key, value, mask, mode=self.mode))


class ResidualOutput(nnx.Module):
    """`LayerNorm(dense(x) + residual)`, the end of every BERT sub-layer."""

    def __init__(self, config: TextConfig, in_features: int, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.dense = Linear(in_features, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = layers.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return shard_batch(self.LayerNorm(drop(self.dense(x), "text") + residual))


class TextAttention(nnx.Module):
    def __init__(
        self, config: TextConfig, source_width: int, *, remat: str, dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.self = AttentionCore(config, source_width, remat=remat, dtype=dtype, rngs=rngs)
        self.output = ResidualOutput(config, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, source: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return self.output(self.self(x, source, mask), x)


class Intermediate(nnx.Module):
    def __init__(self, config: TextConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.gelu(self.dense(x))


class TextLayer(nnx.Module):
    """Self-attention over the prompt, cross-attention to the image, feed-forward."""

    def __init__(
        self, config: TextConfig, vision_width: int, *, remat: str, dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.mode = remat_mode(remat, "blocks")
        self.attention = TextAttention(config, config.hidden_size, remat=remat, dtype=dtype, rngs=rngs)
        self.crossattention = TextAttention(config, vision_width, remat=remat, dtype=dtype, rngs=rngs)
        self.intermediate = Intermediate(config, dtype=dtype, rngs=rngs)
        self.output = ResidualOutput(config, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None, image_embeds: jax.Array | None = None) -> jax.Array:
        return call_with_remat(self._forward, x, mask, image_embeds, mode=self.mode)

    def _forward(self, x, mask, image_embeds):
        x = self.attention(x, x, mask)
        if image_embeds is not None:
            x = self.crossattention(x, image_embeds)
        return self.output(self.intermediate(x), x)


class TextLayers(nnx.Module):
    def __init__(self, config: TextConfig, vision_width: int, **options: Any) -> None:
        self.layer = nnx.List([TextLayer(config, vision_width, **options) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: jax.Array, mask: jax.Array, image_embeds: jax.Array | None = None) -> jax.Array:
        for layer in self.layer:
            x = layer(x, mask, image_embeds)
        return x


class TextEncoder(nnx.Module):
    """ids, mask [B, L] and image_embeds [B, S, vision_width] -> last hidden state [B, L, hidden].

    Without image_embeds the cross-attention is skipped: BLIP's text-only mode.
    """

    def __init__(
        self, config: TextConfig, vision_width: int, *, remat: str = "none", dtype: DTypeLike, rngs: layers.RngsLike
    ) -> None:
        self.embeddings = TextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = TextLayers(config, vision_width, remat=remat, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array, image_embeds: jax.Array | None = None) -> jax.Array:
        return self.encoder(self.embeddings(ids), mask[:, None, None, :].astype(bool), image_embeds)


class Blip(nnx.Module):
    """BLIP's two encoders and the projections to their common space, which ImageReward does not use."""

    def __init__(
        self,
        config: BlipScoreConfig | ImageRewardConfig,
        *,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: layers.RngsLike,
    ) -> None:
        vision, text = config.vision, config.text
        self.visual_encoder = VisionTransformer(vision, remat=remat, dtype=dtype, rngs=rngs)
        self.text_encoder = TextEncoder(text, vision.width, remat=remat, dtype=dtype, rngs=rngs)
        self.vision_proj = Linear(vision.width, config.projection_dim, dtype=dtype, rngs=rngs)
        self.text_proj = Linear(text.hidden_size, config.projection_dim, dtype=dtype, rngs=rngs)


class BlipScoreModel(Blip):
    """BLIP's image-text contrastive score: the cosine of the two projected class tokens, in [-1, 1].

    Attribute names are those of `model_large.pth`. config: a `blip_config.BlipScoreConfig`.
    """

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> unit vectors [B, projection_dim]."""
        return layers.unit(self.vision_proj(self.visual_encoder(pixels)[:, 0]))

    def score_prompts(self, image_embeds: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Cosines [B] float32 of `encode_images`' vectors with the prompts; input_ids, attention_mask: [B, L]."""
        hidden = self.text_encoder(input_ids, attention_mask)
        return (image_embeds * layers.unit(self.text_proj(hidden[:, 0]))).sum(-1)


class HeadDropout(nnx.Module):
    """Dropout number `index` of the head; it takes up an index in the checkpoint's numbering."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, x: jax.Array) -> jax.Array:
        return drop(x, "head", index=self.index)


class RewardHead(nnx.Module):
    """Linear layers without activations, in float32: [B, hidden] -> [B]. Dropout follows the first three."""

    def __init__(self, features: int, sizes: Sequence[int], *, rngs: layers.RngsLike) -> None:
        pairs = itertools.pairwise((features, *sizes, 1))
        linears = [Linear(*pair, std=1 / (features + 1), dtype=jnp.float32, rngs=rngs) for pair in pairs]
        self.layers = nnx.List(
            [linears[0], HeadDropout(0), linears[1], HeadDropout(1), linears[2], HeadDropout(2), *linears[3:]]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x[..., 0]


class ImageRewardModel(nnx.Module):
    """Normalised pixels and prompt tokens -> standardised scores.

    Args:
        config: a `blip_config.ImageRewardConfig`.
        remat: a policy of `models.remat`; the blocks are the transformer layers, and "full" equals "blocks".
        dtype: of the computation; norms, softmax and the head stay float32.
        rngs: `nnx.Rngs` with a `params` stream.
    """

    def __init__(
        self, config: ImageRewardConfig, *, remat: str = "none", dtype: DTypeLike = jnp.float32, rngs: layers.RngsLike
    ) -> None:
        self.config = config
        self.blip = Blip(config, remat=check_remat(remat), dtype=dtype, rngs=rngs)
        self.mlp = RewardHead(config.text.hidden_size, config.head_sizes, rngs=rngs)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> image_embeds [B, tokens, width], reusable for many prompts."""
        return self.blip.visual_encoder(pixels)

    def score_prompts(self, image_embeds: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Scores [B] float32 of each prompt for its image.

        Args:
            image_embeds: [B, tokens, width] from `encode_images`.
            input_ids: [B, L] integers.
            attention_mask: [B, L], non-zero for tokens, 0 for padding.
        """
        hidden = self.blip.text_encoder(input_ids, attention_mask, image_embeds)
        head = self.mlp(hidden[:, 0].astype(jnp.float32))
        return (head - self.config.score_mean) / self.config.score_std

    def __call__(self, pixels: jax.Array, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return self.score_prompts(self.encode_images(pixels), input_ids, attention_mask)
