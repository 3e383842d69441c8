"""The ImageReward network: BLIP's image-grounded text encoder and a scalar head. Arrays in, arrays out.

A vision transformer (timm's key names) reads the picture; a BERT encoder with cross-attention in every layer
(post-norm) reads the prompt while looking at the picture; an MLP turns the feature of the first token into the
score. Follows ImageReward (arXiv 2304.05977) and BLIP (arXiv 2201.12086). Attribute names are the keys of
`ImageReward.pt`, so `imagereward_jax.weights.mapping` converts it without a table.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models import layers

INIT_STD = 0.02  # of every matrix, before training


class Linear(layers.Linear):
    """A Linear that starts from N(0, std) weights and zero biases, as ViT, BERT and the head do."""

    def __init__(self, in_features, out_features, *, std=INIT_STD, dtype, rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (in_features, out_features)))
        self.bias = nnx.Param(jnp.zeros((out_features,)))


class PatchEmbed(nnx.Module):
    """[B, S, S, 3] -> [B, patches, width], in row order."""

    def __init__(self, config, *, dtype, rngs):
        size = config.patch_size
        self.proj = layers.Conv(3, config.width, size, stride=size, dtype=dtype, rngs=rngs)

    def __call__(self, pixels):
        x = self.proj(pixels)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class VisionAttention(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype, rngs=rngs)
        self.proj = Linear(config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        query, key, value = (layers.split_heads(part, self.heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        return self.proj(layers.merge_heads(layers.attention(query, key, value)))


class VisionMlp(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        self.fc1 = Linear(config.width, config.mlp_ratio * config.width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_ratio * config.width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(layers.gelu(self.fc1(x)))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config, *, dtype, rngs):
        self.norm1 = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)
        self.attn = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.norm2 = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = VisionMlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Normalised pixels [B, S, S, 3] -> tokens [B, 1 + patches, width], class token first."""

    def __init__(self, config, *, dtype, rngs):
        self.dtype = dtype
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.tokens, config.width)))
        self.blocks = nnx.List([VisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.norm = layers.LayerNorm(config.width, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, pixels):
        x = self.patch_embed(pixels)
        cls_token = self.cls_token[...].astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x = x + self.pos_embed[...].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextEmbeddings(nnx.Module):
    """Token ids [B, L] -> [B, L, hidden]; BLIP's BERT has no segment embedding."""

    def __init__(self, config, *, dtype, rngs):
        self.word_embeddings = layers.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.position_embeddings = layers.Embedding(
            config.max_position_embeddings, config.hidden_size, dtype=dtype, rngs=rngs
        )
        self.LayerNorm = layers.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, ids):
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1])))


class AttentionCore(nnx.Module):
    """Multi-head attention from `x` [B, L, hidden] to `source` [B, S, source_width]."""

    def __init__(self, config, source_width, *, dtype, rngs):
        self.heads = config.num_attention_heads
        self.query = Linear(config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.key = Linear(source_width, config.hidden_size, dtype=dtype, rngs=rngs)
        self.value = Linear(source_width, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, source, mask):
        query, key, value = (
            layers.split_heads(part, self.heads) for part in (self.query(x), self.key(source), self.value(source))
        )
        return layers.merge_heads(layers.attention(query, key, value, mask=mask))


class ResidualOutput(nnx.Module):
    """`LayerNorm(dense(x) + residual)`, the end of every BERT sub-layer."""

    def __init__(self, config, in_features, *, dtype, rngs):
        self.dense = Linear(in_features, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = layers.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class TextAttention(nnx.Module):
    def __init__(self, config, source_width, *, dtype, rngs):
        self.self = AttentionCore(config, source_width, dtype=dtype, rngs=rngs)
        self.output = ResidualOutput(config, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, source, mask=None):
        return self.output(self.self(x, source, mask), x)


class Intermediate(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return layers.gelu(self.dense(x))


class TextLayer(nnx.Module):
    """Self-attention over the prompt, cross-attention to the picture, feed-forward."""

    def __init__(self, config, vision_width, *, dtype, rngs):
        self.attention = TextAttention(config, config.hidden_size, dtype=dtype, rngs=rngs)
        self.crossattention = TextAttention(config, vision_width, dtype=dtype, rngs=rngs)
        self.intermediate = Intermediate(config, dtype=dtype, rngs=rngs)
        self.output = ResidualOutput(config, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask, image_embeds):
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image_embeds)
        return self.output(self.intermediate(x), x)


class TextLayers(nnx.Module):
    def __init__(self, config, vision_width, *, dtype, rngs):
        self.layer = nnx.List(
            [TextLayer(config, vision_width, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(self, x, mask, image_embeds):
        for layer in self.layer:
            x = layer(x, mask, image_embeds)
        return x


class TextEncoder(nnx.Module):
    """ids, mask [B, L] and image_embeds [B, S, vision_width] -> last hidden state [B, L, hidden]."""

    def __init__(self, config, vision_width, *, dtype, rngs):
        self.embeddings = TextEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = TextLayers(config, vision_width, dtype=dtype, rngs=rngs)

    def __call__(self, ids, mask, image_embeds):
        return self.encoder(self.embeddings(ids), mask[:, None, None, :].astype(bool), image_embeds)


class Blip(nnx.Module):
    """BLIP's two encoders. The projections belong to the checkpoint; the reward does not read them."""

    def __init__(self, config, *, dtype, rngs):
        vision, text = config.vision, config.text
        self.visual_encoder = VisionTransformer(vision, dtype=dtype, rngs=rngs)
        self.text_encoder = TextEncoder(text, vision.width, dtype=dtype, rngs=rngs)
        self.vision_proj = Linear(vision.width, config.projection_dim, dtype=dtype, rngs=rngs)
        self.text_proj = Linear(text.hidden_size, config.projection_dim, dtype=dtype, rngs=rngs)


class Identity(nnx.Module):
    """Holds the index that dropout has in the checkpoint's numbering."""

    def __call__(self, x):
        return x


class RewardHead(nnx.Module):
    """Linear layers without activations, in float32: [B, hidden] -> [B]. Dropout follows the first three."""

    def __init__(self, config, *, rngs):
        features, std = config.text.hidden_size, 1 / (config.text.hidden_size + 1)
        sizes = (features, *config.head_sizes, 1)
        linears = [Linear(*pair, std=std, dtype=jnp.float32, rngs=rngs) for pair in itertools.pairwise(sizes)]
        self.layers = nnx.List(
            [linears[0], Identity(), linears[1], Identity(), linears[2], Identity(), linears[3], linears[4]]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x[..., 0]


class ImageRewardModel(nnx.Module):
    """Normalised pixels and prompt tokens -> standardised scores.

    Args:
        config: a `blip_config.ImageRewardConfig`.
        dtype: of the arithmetic; norms, softmax and the head stay float32.
        rngs: `nnx.Rngs` with a `params` stream.
    """

    def __init__(self, config, *, dtype=jnp.float32, rngs):
        self.config = config
        self.blip = Blip(config, dtype=dtype, rngs=rngs)
        self.mlp = RewardHead(config, rngs=rngs)

    def encode_images(self, pixels):
        """Normalised pixels [B, S, S, 3] -> image_embeds [B, tokens, width], to be reused for many prompts."""
        return self.blip.visual_encoder(pixels)

    def score_prompts(self, image_embeds, input_ids, attention_mask):
        """Scores [B] float32 of each prompt with its picture.

        Args:
            image_embeds: [B, tokens, width] of `encode_images`.
            input_ids: [B, L] integers.
            attention_mask: [B, L], non-zero where there is a token.
        """
        hidden = self.blip.text_encoder(input_ids, attention_mask, image_embeds)
        head = self.mlp(hidden[:, 0].astype(jnp.float32))
        return (head - self.config.score_mean) / self.config.score_std

    def __call__(self, pixels, input_ids, attention_mask):
        return self.score_prompts(self.encode_images(pixels), input_ids, attention_mask)
