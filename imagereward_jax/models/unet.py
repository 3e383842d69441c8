"""The conditional UNet of Stable Diffusion 1.x, 2.x and XL, after diffusers' `UNet2DConditionModel`.

Attributes are named as in the published checkpoints; images are [B, H, W, C].
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.config import (
    Fixed,
    check_all_positive,
    check_choice,
    check_positive,
    read_config,
    write_config,
)
from imagereward_jax.models.embeddings import TimestepEmbedding, sinusoidal_embedding
from imagereward_jax.models.layers import Conv, GroupNorm, Keys, RngsLike
from imagereward_jax.models.remat import call_with_remat, check_remat, remat_mode
from imagereward_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, last_layers
from imagereward_jax.models.sharding import shard_batch
from imagereward_jax.models.transformer import Transformer2DModel

_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "UpBlock2D")
_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": Fixed((None,), "this network projects its conditions, as Kandinsky's and IP-Adapter's do"),
    "encoder_hid_dim_type": Fixed((None,), "this network projects its conditions, as Kandinsky's and IP-Adapter's do"),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": Fixed((None,), "the guidance scale is an input of this network (latent consistency)"),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # Attention weights are always float32 here, so both settings are met.
    "upcast_attention": (False, True, None),
}

# config.json of Stable Diffusion 1.x and XL, without default values.
SD1 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """config.json of a UNet; the defaults are diffusers', as old files omit them.

    `attention_head_dim` is the *number* of heads, a mistake that the checkpoints have kept. `attention_head_dim`,
    `transformer_layers_per_block` and `layers_per_block` are one number, or one per down block.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name, choices in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            self._check_length(name, levels)
            for kind in getattr(self, name):
                check_choice(type(self), name, kind, choices)
        check_positive(
            self, "in_channels", "out_channels", "norm_num_groups", "cross_attention_dim", "conv_in_kernel",
            "conv_out_kernel",
        )  # fmt: skip
        check_all_positive(self, "block_out_channels", "layers_per_block", "attention_head_dim")
        check_choice(type(self), "addition_embed_type", self.addition_embed_type, (None, "text_time"))
        if self.sample_size is not None:
            check_all_positive(self, "sample_size")
        if self.addition_embed_type is not None:
            check_positive(self, "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            if isinstance(getattr(self, name), tuple):
                self._check_length(name, levels)
        self._check_divisible()

    def _check_length(self, name, levels):
        value = getattr(self, name)
        if len(value) != levels:
            raise ValueError(
                f"UNet2DConditionConfig: {name}={value!r} should have {levels} items, as block_out_channels has"
            )

    def _check_divisible(self):
        if any(not isinstance(depth, int) or depth < 0 for depth in self.per_level("transformer_layers_per_block")):
            raise ValueError(
                f"UNet2DConditionConfig: transformer_layers_per_block={self.transformer_layers_per_block!r} "
                "is not implemented, only one whole number per level"
            )
        for kernel in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, kernel) % 2 == 0:
                raise ValueError(f"UNet2DConditionConfig: {kernel}={getattr(self, kernel)} should be odd")
        for channels, heads in zip(self.block_out_channels, self.per_level("attention_head_dim")):
            if channels % heads:
                raise ValueError(
                    f"UNet2DConditionConfig: attention_head_dim={heads} (the number of heads) does not divide "
                    f"{channels} of block_out_channels"
                )

    def per_level(self, name: str) -> tuple[int, ...]:
        """Returns the field `name` as one number per level, finest first."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNet2DConditionConfig":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        return read_config(cls, values, fixed=_FIXED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as diffusers reads it."""
        return {"_class_name": "UNet2DConditionModel", **write_config(self)}


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

    def transformer(self, channels):
        config = self.config
        return Transformer2DModel(
            channels, config.per_level("attention_head_dim")[self.index], config.cross_attention_dim,
            depth=config.per_level("transformer_layers_per_block")[self.index], linear=config.use_linear_projection,
            groups=config.norm_num_groups, remat=self.remat, dtype=self.dtype, rngs=self.rngs,
        )  # fmt: skip


class DownBlock(nnx.Module):
    """Residual blocks (each with a transformer in "CrossAttnDownBlock2D"), then a downsampler if `halve`."""

    def __init__(self, level: _Level, kind: str, in_channels: int, channels: int, *, layers: int, halve: bool) -> None:
        self.mode = remat_mode(level.remat, "full")
        self.resnets = nnx.List([level.resnet(channels if i else in_channels, channels) for i in range(layers)])
        cross = kind == "CrossAttnDownBlock2D"
        self.attentions = nnx.List([level.transformer(channels) for _ in range(layers if cross else 0)])
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
    """Residual block, transformer, residual block at the coarsest resolution."""

    def __init__(self, level: _Level, channels: int) -> None:
        self.mode = remat_mode(level.remat, "full")
        self.resnets = nnx.List([level.resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([level.transformer(channels)])

    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        return call_with_remat(self._forward, x, time, context, mode=self.mode)

    def _forward(self, x, time, context):
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


class UpBlock(nnx.Module):
    """Residual blocks with one skip connection each, transformers as in `DownBlock`, then an upsampler if `double`."""

    def __init__(
        self, level: _Level, kind: str, in_channels: int, skip_channels: Sequence[int], channels: int, *, double: bool
    ) -> None:
        self.mode = remat_mode(level.remat, "full")
        widths = [in_channels] + [channels] * (len(skip_channels) - 1)
        self.resnets = nnx.List([level.resnet(a + b, channels) for a, b in zip(widths, skip_channels)])
        cross = kind == "CrossAttnUpBlock2D"
        self.attentions = nnx.List([level.transformer(channels) for _ in range(len(skip_channels) if cross else 0)])
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
        self.mid_block = MidBlock(levels[-1], channels[-1])
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
        blocks.append(DownBlock(level, kind, width, channels, layers=layers, halve=halve))
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
