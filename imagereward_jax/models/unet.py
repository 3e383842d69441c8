"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, after diffusers' `UNet2DConditionModel`.

Attributes are named as in the published checkpoints; images are [B, H, W, C].
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from imagereward_jax.models.layers import Conv, GroupNorm, Keys, RngsLike
from imagereward_jax.models.remat import call_with_remat, check_remat, remat_mode
from imagereward_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, last_layers
from imagereward_jax.models.sharding import shard_batch
from imagereward_jax.models.transformer import Transformer2DModel
from imagereward_jax.models.unet_config import NO_ATTENTION, UNet2DConditionConfig


@dataclasses.dataclass(frozen=True)
class _Level:
    """Settings shared by the blocks of one resolution; builds their parts."""

    config: UNet2DConditionConfig
    index: int
    remat: str
    dtype: jnp.dtype
    rngs: Keys

    def resnet(self, in_channels, out_channels):
        config = self.config
        return ResnetBlock2D(
            in_channels, out_channels, time_features=4 * config.block_out_channels[0], groups=config.norm_num_groups,
            eps=config.norm_eps, remat=self.remat, dtype=self.dtype, rngs=self.rngs,
        )  # fmt: skip

    def transformers(self, channels, kind, depths):
        """One of each depth, in a block whose kind has them."""
        return nnx.List([self.transformer(channels, depth) for depth in depths if "CrossAttn" in kind])

    def transformer(self, channels, depth):
        config = self.config
        return Transformer2DModel(
            channels, config.per_level("attention_head_dim")[self.index], config.cross_attention_dim,
            depth=depth, linear=config.use_linear_projection,
            groups=config.norm_num_groups, remat=self.remat, dtype=self.dtype, rngs=self.rngs,
        )  # fmt: skip


class DownBlock(nnx.Module):
    """Residual blocks (each with a transformer in "CrossAttnDownBlock2D"), then a downsampler if `halve`."""

    def __init__(self, level: _Level, kind: str, in_channels: int, channels: int, *, halve: bool) -> None:
        self.mode = remat_mode(level.remat, "full")
        depths = level.config.transformer_depths(level.index)
        self.resnets = nnx.List([level.resnet(channels if i else in_channels, channels) for i in range(len(depths))])
        self.attentions = level.transformers(channels, kind, depths)
        options = {"remat": level.remat, "dtype": level.dtype, "rngs": level.rngs}
        self.downsamplers = nnx.List([Downsample2D(channels, **options)] if halve else [])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the result and the list of skip connections for the up blocks."""
        return call_with_remat(self._forward, x, time, context, mode=self.mode)

    def _forward(self, x, time, context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """Residual block at the coarsest resolution; unless `kind` is without attention, a transformer and another one."""

    def __init__(self, level: _Level, kind: str, channels: int) -> None:
        self.mode = remat_mode(level.remat, "full")
        depths = level.config.transformer_depths(level.index)[: int(kind != NO_ATTENTION)]
        self.resnets = nnx.List([level.resnet(channels, channels) for _ in range(1 + len(depths))])
        self.attentions = level.transformers(channels, kind, depths)

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        return call_with_remat(self._forward, x, time, context, mode=self.mode)

    def _forward(self, x, time, context):
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:]):
            x = resnet(attention(x, context), time)
        return x


class UpBlock(nnx.Module):
    """Residual blocks with one skip connection each, transformers as in `DownBlock`, then an upsampler if `double`."""

    def __init__(
        self, level: _Level, kind: str, in_channels: int, skip_channels: Sequence[int], channels: int, *, double: bool
    ) -> None:
        self.mode = remat_mode(level.remat, "full")
        widths = [in_channels] + [channels] * (len(skip_channels) - 1)
        self.resnets = nnx.List([level.resnet(a + b, channels) for a, b in zip(widths, skip_channels)])
        self.attentions = level.transformers(channels, kind, level.config.transformer_depths(level.index, up=True))
        options = {"remat": level.remat, "dtype": level.dtype, "rngs": level.rngs}
        self.upsamplers = nnx.List([Upsample2D(channels, **options)] if double else [])

    def __call__(
        self,
        x: jax.Array,
        skips: Sequence[jax.Array],
        time: jax.Array,
        context: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        """skips: skip connections in order of use; size: the output's (height, width)."""
        forward = lambda images, time, context: self._forward(*images, time, context, size)  # noqa: E731
        return call_with_remat(forward, (x, skips), time, context, mode=self.mode)

    def _forward(self, x, skips, time, context, size):
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[i]], axis=-1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts noise (or velocity) from noisy latents, the timestep and the encoded prompt.

    Args:
        config: sizes.
        remat: one of `remat.REMAT_POLICIES`; selects which activations the backward pass recomputes.
        dtype: of the computation; norms, attention weights and time embedding are always float32.

    Raises:
        ValueError: `remat` is unknown.
    """

    def __init__(
        self, config: UNet2DConditionConfig, *, dtype: DTypeLike = jnp.float32, remat: str = "none", rngs: RngsLike
    ) -> None:
        check_remat(remat)
        self.config, self.dtype, self.mode = config, dtype, remat_mode(remat, "blocks")
        rngs = Keys(rngs)
        channels = config.block_out_channels
        self.conv_in = Conv(
            config.in_channels, channels[0], config.conv_in_kernel, padding=config.conv_in_kernel // 2,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], dtype=dtype, rngs=rngs)
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim, 4 * channels[0], dtype=dtype, rngs=rngs)
            if config.addition_embed_type == "text_time"
            else None
        )
        levels = [_Level(config, index, remat, dtype, rngs) for index in range(len(channels))]
        self.down_blocks, skip_channels = _down_blocks(config, levels)
        kind = config.mid_block_type
        self.mid_block = None if kind is None else MidBlock(levels[-1], kind, channels[-1])
        self.up_blocks = _up_blocks(config, levels, skip_channels)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps, dtype=dtype)
        self.conv_out = Conv(
            channels[0], config.out_channels, config.conv_out_kernel, padding=config.conv_out_kernel // 2,
            dtype=dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        added_cond: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Runs the network.

        Args:
            sample: noisy latents [B, h, w, in_channels], of any height and width.
            timesteps: [B] or a scalar, int or float.
            encoder_hidden_states: encoded prompts [B, T, cross_attention_dim].
            added_cond: for "text_time" (SDXL) {"text_embeds": [B, E], "time_ids": [B, n]}, else None.

        Returns:
            float32 [B, h, w, out_channels].

        Raises:
            ValueError: shapes or conditions do not match the config.
        """
        self._check_inputs(sample, encoder_hidden_states, added_cond)
        # Every residual block applies SiLU to the embedding first, so it is computed once here.
        time = jax.nn.silu(self._embed_time(timesteps, sample.shape[0], added_cond))
        context = encoder_hidden_states.astype(self.dtype)
        x = shard_batch(self.conv_in(sample))
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            count = len(block.resnets)
            taken, skips = skips[-count:][::-1], skips[:-count]
            x = block(x, taken, time, context, skips[-1].shape[1:3] if skips else None)
        return last_layers(self, x).astype(jnp.float32)

    def _embed_time(self, timesteps, batch, added_cond):
        config = self.config
        options = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (batch,))
        time = self.time_embedding(sinusoidal_embedding(timesteps, config.block_out_channels[0], **options))
        if self.add_embedding is None:
            return time
        ids = jnp.asarray(added_cond["time_ids"])
        ids = sinusoidal_embedding(ids.reshape(-1), config.addition_time_embed_dim, **options).reshape(batch, -1)
        return time + self.add_embedding(jnp.concatenate([added_cond["text_embeds"].astype(jnp.float32), ids], -1))

    def _check_inputs(self, sample, encoder_hidden_states, added_cond):
        config = self.config
        if sample.ndim != 4 or sample.shape[-1] != config.in_channels:
            raise ValueError(f"sample should be [B, h, w, {config.in_channels}], not {list(sample.shape)}")
        wanted = (sample.shape[0], config.cross_attention_dim)
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[::2] != wanted:
            shape = list(encoder_hidden_states.shape)
            raise ValueError(f"encoder_hidden_states should be [{wanted[0]}, T, {wanted[1]}], not {shape}")
        if (added_cond is None) != (self.add_embedding is None):
            wants = "no added_cond" if self.add_embedding is None else 'added_cond {"text_embeds", "time_ids"}'
            raise ValueError(f"this UNet takes {wants} (addition_embed_type={config.addition_embed_type!r})")
        if added_cond is not None:
            text, ids = (added_cond[name].shape[-1] for name in ("text_embeds", "time_ids"))
            total = text + ids * config.addition_time_embed_dim
            if total != config.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"added_cond has {text} text features and {ids} ids of {config.addition_time_embed_dim}, {total} "
                    f"in total; projection_class_embeddings_input_dim={config.projection_class_embeddings_input_dim}"
                )


def _down_blocks(config, levels):
    """Builds the down blocks; returns them and the channels of every skip connection."""
    blocks, width = [], config.block_out_channels[0]
    skip_channels = [width]
    for level, kind, channels, layers in zip(
        levels, config.down_block_types, config.block_out_channels, config.per_level("layers_per_block")
    ):
        halve = level is not levels[-1]
        blocks.append(DownBlock(level, kind, width, channels, halve=halve))
        skip_channels += [channels] * (layers + halve)
        width = channels
    return nnx.List(blocks), skip_channels


def _up_blocks(config, levels, skip_channels):
    """Builds the up blocks, coarsest first; each has one more skip connection than its down block has layers."""
    blocks, width, skip_channels = [], config.block_out_channels[-1], list(skip_channels)
    for level, kind in zip(reversed(levels), config.up_block_types):
        channels = config.block_out_channels[level.index]
        taken = [skip_channels.pop() for _ in range(config.per_level("layers_per_block")[level.index] + 1)]
        blocks.append(UpBlock(level, kind, width, taken, channels, double=level.index > 0))
        width = channels
    return nnx.List(blocks)
