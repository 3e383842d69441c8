"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT, arXiv 2403.03206), after diffusers' `SD3Transformer2DModel`.

Image and text tokens have weights of their own and attend to each other. Attributes are named as in the published
checkpoints; latents are [B, H, W, C].
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import embeddings, scanned_layers
from imagereward_jax.models.layers import (
    Conv,
    Keys,
    Linear,
    RMSNorm,
    RngsLike,
    attention,
    merge_heads,
    normalise,
    split_heads,
)
from imagereward_jax.models.mmdit_config import SD3Transformer2DConfig
from imagereward_jax.models.remat import call_with_remat, check_remat, remat_mode
from imagereward_jax.models.sharding import shard_batch
from imagereward_jax.models.transformer import FeedForward, TanhGELU

EPS = 1e-6  # of every norm
TIME_FEATURES = 256


class PatchEmbed(nnx.Module):
    """Patches of latents as tokens, plus their positions, read from the middle of a table that never trains."""

    torch_names = {"position_table": ("pos_embed", None)}

    def __init__(self, config: SD3Transformer2DConfig, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.dtype, self.patch, self.side = dtype, config.patch_size, config.pos_embed_max_size
        self.proj = Conv(
            config.in_channels, config.features, self.patch, stride=self.patch, dtype=dtype, rngs=rngs
        )  # fmt: skip
        base = config.sample_size // self.patch
        # Published tables differ from this one: 3.5-medium's has other steps and an offset.
        self.position_table = nnx.Param(embeddings.position_table(self.side, config.features, base=base)[None])

    def __call__(self, latents: jax.Array) -> jax.Array:
        """latents: [B, H, W, in_channels]. Returns [B, H / patch * W / patch, features], row by row."""
        tokens = shard_batch(self.proj(latents))
        batch, height, width, features = tokens.shape
        tokens = tokens.reshape(batch, height * width, features)
        return shard_batch((tokens + self._positions(height, width)).astype(self.dtype))

    def _positions(self, height, width):
        """The table's entries [height * width, features] for the rectangle in its middle.

        They are looked up by index: of a table that lies in shards, each device contributes the rows it has. A slice
        would all-gather the whole table, 0.9 GB for 3.5-medium.
        """
        top, left = (self.side - height) // 2, (self.side - width) // 2
        indices = (top + np.arange(height))[:, None] * self.side + left + np.arange(width)
        table = jax.lax.stop_gradient(self.position_table[...])[0]
        return jnp.take(table, indices.reshape(-1), axis=0, mode="clip")


class CombinedTimestepTextProjEmbeddings(nnx.Module):
    """The sum of an embedding of the timestep and one of the pooled text."""

    def __init__(self, config: SD3Transformer2DConfig, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        embedding = embeddings.TimestepEmbedding
        self.timestep_embedder = embedding(TIME_FEATURES, config.features, dtype=dtype, rngs=rngs)
        self.text_embedder = embedding(config.pooled_projection_dim, config.features, dtype=dtype, rngs=rngs)

    def __call__(self, timesteps: jax.Array, pooled: jax.Array) -> jax.Array:
        """timesteps: [B]; pooled: [B, pooled_projection_dim]. Returns [B, features]."""
        time = self.timestep_embedder(embeddings.sinusoidal_embedding(timesteps, TIME_FEATURES))
        return time + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """Linear layer from the embedding of time and text to `count` vectors that scale, shift and gate tokens."""

    def __init__(self, features: int, count: int, *, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.count = count
        self.linear = Linear(features, count * features, dtype=dtype, rngs=rngs)

    def __call__(self, time: jax.Array) -> list[jax.Array]:
        """time: [B, features] after SiLU. Returns arrays [B, 1, features]."""
        return jnp.split(self.linear(time)[:, None], self.count, axis=-1)


def modulate(normalised: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Scales and shifts float32 tokens [B, T, features] by [B, 1, features], in float32; the dtype of `scale`."""
    return (normalised * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(scale.dtype)


class JointAttention(nnx.Module):
    """Multi-head attention of image tokens, and of text tokens if `text`, to all of them.

    Args:
        text: whether there are text tokens. text_out: whether their result is used.
        qk_norm: whether queries and keys are normalised, by head.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        qk_norm: bool,
        text: bool,
        text_out: bool = False,
        remat: str,
        dtype: DTypeLike,
        rngs: RngsLike,
    ) -> None:
        self.heads, self.mode = heads, remat_mode(remat, "attention")

        def linear(wanted=True):
            return Linear(features, features, dtype=dtype, rngs=rngs) if wanted else None

        def norm(wanted=True):
            return RMSNorm(features // heads, eps=EPS, dtype=dtype) if qk_norm and wanted else None

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(text), linear(text), linear(text)
        self.norm_added_q, self.norm_added_k = norm(text), norm(text)
        self.to_out = nnx.List([linear()])
        self.to_add_out = linear(text_out)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """x: [B, T, features] of the image; context: [B, S, features] of the text. Returns the same, or None."""
        parts = self._heads(x, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k))
        if context is not None:
            projections = self.add_q_proj, self.add_k_proj, self.add_v_proj
            added = self._heads(context, projections, (self.norm_added_q, self.norm_added_k))
            parts = [jnp.concatenate(both, axis=1) for both in zip(parts, added)]
        mixed = merge_heads(call_with_remat(attention, *parts, mode=self.mode))
        x_out = self.to_out[0](mixed[:, : x.shape[1]])
        return x_out, None if self.to_add_out is None else self.to_add_out(mixed[:, x.shape[1] :])

    def _heads(self, tokens, projections, norms):
        """Queries, keys and values [B, T, heads, head_dim] of tokens."""
        parts = [split_heads(shard_batch(project(tokens)), self.heads) for project in projections]
        return [part if norm is None else norm(part) for part, norm in zip(parts, (*norms, None))]


class JointTransformerBlock(nnx.Module):
    """Attention over image and text tokens, then a feed-forward network for each.

    Args:
        dual: whether image tokens also attend to each other alone (3.5-medium).
        context_pre_only: whether it is the last block: the text is attended to, and its own result is not computed.
    """

    def __init__(
        self,
        config: SD3Transformer2DConfig,
        *,
        dual: bool,
        context_pre_only: bool,
        remat: str,
        dtype: DTypeLike,
        rngs: RngsLike,
    ) -> None:
        self.mode = remat_mode(remat, "blocks")
        features, options = config.features, {"dtype": dtype, "rngs": rngs}
        of_attention = {"qk_norm": config.qk_norm is not None, "remat": remat, **options}
        heads, goes_on = config.num_attention_heads, not context_pre_only
        self.norm1 = Modulation(features, 9 if dual else 6, **options)
        self.norm1_context = Modulation(features, 6 if goes_on else 2, **options)
        self.attn = JointAttention(features, heads, text=True, text_out=goes_on, **of_attention)
        self.attn2 = JointAttention(features, heads, text=False, **of_attention) if dual else None
        self.ff = FeedForward(features, activation=TanhGELU, **options)
        self.ff_context = FeedForward(features, activation=TanhGELU, **options) if goes_on else None

    def __call__(
        self, x: jax.Array, context: jax.Array, time: jax.Array, skip: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the block.

        Args:
            x: image tokens [B, T, features]. context: text tokens [B, S, features].
            time: embedding of time and pooled text [B, features], after SiLU.
            skip: boolean; True leaves both kinds of tokens as they are. None: it is not skipped.

        Returns:
            New image and text tokens; the last block returns the text tokens as they are.
        """
        in_scan = scanned_layers.is_scanned(self)
        return call_with_remat(self._forward, (x, context), time, skip, mode=self.mode, in_scan=in_scan)

    def _forward(self, tokens, time, skip):
        if skip is None:
            return self._block(tokens, time)
        return jax.lax.cond(skip, lambda tokens: tokens, lambda tokens: self._block(tokens, time), tokens)

    def _block(self, tokens, time):
        x, context = tokens
        shift, scale, gate, *of_mlp = self.norm1(time)
        normalised = normalise(x, EPS)
        if self.ff_context is None:
            context_scale, context_shift = self.norm1_context(time)
        else:
            context_shift, context_scale, context_gate, *context_mlp = self.norm1_context(time)
        y, context_y = self.attn(
            modulate(normalised, scale, shift), modulate(normalise(context, EPS), context_scale, context_shift)
        )
        x = shard_batch(x + gate * y)
        if self.attn2 is not None:
            shift, scale, gate = of_mlp[3:]
            x = shard_batch(x + gate * self.attn2(modulate(normalised, scale, shift))[0])
        x = _feed_forward(self.ff, x, *of_mlp[:3])
        if self.ff_context is not None:
            context = _feed_forward(self.ff_context, shard_batch(context + context_gate * context_y), *context_mlp)
        return x, context


def _feed_forward(layer, tokens, shift, scale, gate):
    return shard_batch(tokens + gate * layer(modulate(normalise(tokens, EPS), scale, shift)))


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity (noise minus image) from noisy latents, the timestep and the encoded prompt.

    Args:
        config: sizes.
        remat: one of `remat.REMAT_POLICIES`; selects which activations the backward pass recomputes. "full" is
            "blocks": there is no unit between a block and the whole network.
        dtype: of the computation; norms, attention weights and sines of time and positions are always float32.

    Raises:
        ValueError: `remat` is unknown.
    """

    def __init__(
        self, config: SD3Transformer2DConfig, *, dtype: DTypeLike = jnp.float32, remat: str = "none", rngs: RngsLike
    ) -> None:
        check_remat(remat)
        self.config, self.dtype = config, dtype
        options = {"dtype": dtype, "rngs": Keys(rngs)}
        self.pos_embed = PatchEmbed(config, **options)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(config, **options)
        self.context_embedder = Linear(config.joint_attention_dim, config.features, **options)
        kinds = [
            {"dual": index in config.dual_attention_layers, "context_pre_only": index == config.num_layers - 1}
            for index in range(config.num_layers)
        ]
        blocks = [JointTransformerBlock(config, remat=remat, **kind, **options) for kind in kinds]
        self.transformer_blocks = scanned_layers.stack_runs(blocks, kinds)
        self.norm_out = Modulation(config.features, 2, **options)
        self.proj_out = Linear(config.features, config.patch_size**2 * config.out_channels, **options)

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        pooled_projections: jax.Array,
        *,
        skip_layers: Collection[int] = (),
    ) -> jax.Array:
        """Runs the network.

        Args:
            sample: noisy latents [B, H, W, in_channels]; H and W are multiples of patch_size.
            timesteps: [B] or a scalar in [0, 1000], 1000 * sigma; fractions count.
            encoder_hidden_states: encoded prompts [B, T, joint_attention_dim]; every token is attended to.
            pooled_projections: pooled prompts [B, pooled_projection_dim].
            skip_layers: indices of blocks that are left out, for skip-layer guidance.

        Returns:
            float32 [B, H, W, out_channels].

        Raises:
            ValueError: shapes do not match the config or each other, the latents are larger than the position table,
                or there is no layer of an index in `skip_layers`.
        """
        self._check_inputs(sample, encoder_hidden_states, pooled_projections, skip_layers)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (sample.shape[0],))
        # Every modulation applies SiLU to the embedding first, so it is computed once here.
        time = jax.nn.silu(self.time_text_embed(timesteps, pooled_projections))
        tokens = self.pos_embed(sample), shard_batch(self.context_embedder(encoder_hidden_states))
        for run in self.transformer_blocks:
            tokens = _run_blocks(run, tokens, time, skip_layers)
        scale, shift = self.norm_out(time)
        out = self.proj_out(modulate(normalise(tokens[0], EPS), scale, shift))
        return shard_batch(self._unpatch(out, *sample.shape[1:3])).astype(jnp.float32)

    def _unpatch(self, tokens, height, width):
        """[B, H / patch * W / patch, patch * patch * C] -> [B, H, W, C]."""
        patch, batch = self.config.patch_size, tokens.shape[0]
        patches = tokens.reshape(batch, height // patch, width // patch, patch, patch, self.config.out_channels)
        return patches.swapaxes(2, 3).reshape(batch, height, width, self.config.out_channels)

    def _check_inputs(self, sample, encoder_hidden_states, pooled, skip_layers):
        config = self.config
        if sample.ndim != 4 or sample.shape[-1] != config.in_channels:
            raise ValueError(f"sample should be [B, H, W, {config.in_channels}], not {list(sample.shape)}")
        patch, side = config.patch_size, config.pos_embed_max_size
        for name, size in zip(("height", "width"), sample.shape[1:3]):
            if size % patch or size > side * patch:
                raise ValueError(
                    f"sample has a {name} of {size}; it should be a multiple of patch_size={patch} and at most "
                    f"{side * patch}, {patch} * pos_embed_max_size"
                )
        wanted = (sample.shape[0], config.joint_attention_dim)
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[::2] != wanted:
            shape = list(encoder_hidden_states.shape)
            raise ValueError(f"encoder_hidden_states should be [{wanted[0]}, T, {wanted[1]}], not {shape}")
        wanted = [sample.shape[0], config.pooled_projection_dim]
        if list(pooled.shape) != wanted:
            raise ValueError(f"pooled_projections should be {wanted}, not {list(pooled.shape)}")
        if unknown := [index for index in skip_layers if index not in range(config.num_layers)]:
            raise ValueError(f"skip_layers has {unknown[0]!r}; the layers are 0 to {config.num_layers - 1}")


def _run_blocks(run, tokens, time, skip_layers):
    """Applies the blocks of a run of equal kind to (image tokens, text tokens)."""
    skipped = [run.first_layer + index in skip_layers for index in range(run.stacked)]
    if all(skipped):
        return tokens
    flags = (jnp.array(skipped),) if any(skipped) else ()
    return scanned_layers.scan(run, lambda block, tokens, *skip: block(*tokens, time, *skip), tokens, *flags)
