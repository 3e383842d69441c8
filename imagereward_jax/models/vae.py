"""The image autoencoder of Stable Diffusion, after diffusers' `AutoencoderKL`. Images and latents are [B, H, W, C]."""

import dataclasses
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
from imagereward_jax.models.layers import Conv, GroupNorm, Keys, RngsLike
from imagereward_jax.models.remat import call_with_remat, check_remat, remat_mode
from imagereward_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D, last_layers
from imagereward_jax.models.transformer import Attention

_EPS = 1e-6
_NORMALISED = "the model's latents are normalised by channel (Playground 2.5), not scaled by one factor"
_FIXED = {
    "act_fn": ("silu", "swish"),
    "latents_mean": Fixed((None,), _NORMALISED),
    "latents_std": Fixed((None,), _NORMALISED),
    "mid_block_add_attention": (True,),
}

# config.json of Stable Diffusion 1.x, XL and 3, without default values.
SD1 = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
SDXL = SD1 | {"scaling_factor": 0.13025}
SD3 = SD1 | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """config.json of a VAE; the defaults are diffusers', as old files omit them.

    The diffusion model works on `(latents - shift_factor) * scaling_factor`; shift_factor None means 0.
    `use_quant_conv` and `use_post_quant_conv`: whether a 1x1 convolution follows the encoder and precedes the decoder.
    `force_upcast` marks weights that overflow in float16; callers should compute in float32 or bfloat16.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self):
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            kinds = getattr(self, name)
            for value in kinds:
                check_choice(type(self), name, value, (kind,))
            if len(kinds) != len(self.block_out_channels):
                raise ValueError(
                    f"AutoencoderKLConfig: {name}={kinds!r} should have {len(self.block_out_channels)} items, "
                    "as block_out_channels has"
                )
        check_positive(self, "in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        check_all_positive(self, "block_out_channels", "sample_size")
        if not self.scaling_factor > 0:
            raise ValueError(f"AutoencoderKLConfig: scaling_factor={self.scaling_factor!r} should be a number above 0")
        for name in ("use_quant_conv", "use_post_quant_conv"):
            check_choice(type(self), name, getattr(self, name), (True, False))

    @property
    def downsampling(self) -> int:
        """Pixels of the image per pixel of the latents, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AutoencoderKLConfig":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        return read_config(cls, values, fixed=_FIXED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as diffusers reads it."""
        return {"_class_name": "AutoencoderKL", **write_config(self)}


class MidAttention(Attention):
    """Single-head self-attention over all pixels, around a skip connection."""

    def __init__(self, channels: int, *, groups: int, remat: str, dtype: DTypeLike, rngs: RngsLike) -> None:
        super().__init__(channels, 1, bias=True, remat=remat, dtype=dtype, rngs=rngs)
        self.block_mode = remat_mode(remat, "blocks")
        self.group_norm = GroupNorm(groups, channels, eps=_EPS, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [B, H, W, channels]; returns the same shape."""
        return call_with_remat(self._forward, x, mode=self.block_mode)

    def _forward(self, x):
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, channels)
        return x + super().__call__(tokens).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, groups: int, remat: str, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.mode = remat_mode(remat, "full")
        options = {"groups": groups, "remat": remat, "dtype": dtype, "rngs": rngs}
        self.attentions = nnx.List([MidAttention(channels, **options)])
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, eps=_EPS, **options) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return call_with_remat(self._forward, x, mode=self.mode)

    def _forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResampleBlock(nnx.Module):
    """Residual blocks, then the `resamplers` of a subclass."""

    def __init__(
        self, in_channels: int, channels: int, *, layers: int, groups: int, remat: str, dtype: DTypeLike, rngs: RngsLike
    ) -> None:
        self.mode = remat_mode(remat, "full")
        options = {"groups": groups, "remat": remat, "dtype": dtype, "rngs": rngs}
        widths = [in_channels] + [channels] * (layers - 1)
        self.resnets = nnx.List([ResnetBlock2D(width, channels, eps=_EPS, **options) for width in widths])

    def __call__(self, x: jax.Array) -> jax.Array:
        return call_with_remat(self._forward, x, mode=self.mode)

    def _forward(self, x):
        for layer in (*self.resnets, *self.resamplers()):
            x = layer(x)
        return x


class DownBlock(ResampleBlock):
    """Residual blocks, then a downsampler if `resample`; it pads with zeros below and to the right only."""

    def __init__(self, in_channels: int, channels: int, *, resample: bool, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        self.downsamplers = nnx.List(
            [Downsample2D(channels, padding=((0, 1), (0, 1)), **_shared(options))] if resample else []
        )

    def resamplers(self) -> nnx.List:
        """Returns the layers after the residual blocks."""
        return self.downsamplers


class UpBlock(ResampleBlock):
    """Residual blocks, then an upsampler if `resample`."""

    def __init__(self, in_channels: int, channels: int, *, resample: bool, **options: Any) -> None:
        super().__init__(in_channels, channels, **options)
        self.upsamplers = nnx.List([Upsample2D(channels, **_shared(options))] if resample else [])

    def resamplers(self) -> nnx.List:
        """Returns the layers after the residual blocks."""
        return self.upsamplers


def _shared(options):
    """The options of a block that its resampler has too."""
    return {name: options[name] for name in ("remat", "dtype", "rngs")}


class Encoder(nnx.Module):
    """Encodes images to the moments of the latents."""

    def __init__(self, config: AutoencoderKLConfig, *, remat: str, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.mode = remat_mode(remat, "blocks")
        options = {"groups": config.norm_num_groups, "remat": remat, "dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0], 3, padding=1, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(width, out, layers=config.layers_per_block, resample=i < len(channels) - 1, **options)
                for i, (width, out) in enumerate(zip((channels[0], *channels), channels))
            ]
        )
        self.mid_block = MidBlock(channels[-1], **options)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS, dtype=dtype)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return last_layers(self, self.mid_block(x))


class Decoder(nnx.Module):
    """Decodes latents to images."""

    def __init__(self, config: AutoencoderKLConfig, *, remat: str, dtype: DTypeLike, rngs: RngsLike) -> None:
        self.mode = remat_mode(remat, "blocks")
        options = {"groups": config.norm_num_groups, "remat": remat, "dtype": dtype, "rngs": rngs}
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], 3, padding=1, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(channels[0], **options)
        self.up_blocks = nnx.List(
            [
                UpBlock(width, out, layers=config.layers_per_block + 1, resample=i < len(channels) - 1, **options)
                for i, (width, out) in enumerate(zip((channels[0], *channels), channels))
            ]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS, dtype=dtype)
        self.conv_out = Conv(channels[-1], config.out_channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return last_layers(self, x)


class AutoencoderKL(nnx.Module):
    """Autoencoder: encodes images as Gaussians over latents, decodes latents to images.

    Args:
        config: sizes.
        remat: one of `remat.REMAT_POLICIES`; selects which activations the backward pass recomputes.
        dtype: of the computation; norms and attention weights are always float32.

    Raises:
        ValueError: `remat` is unknown.
    """

    def __init__(
        self, config: AutoencoderKLConfig, *, dtype: DTypeLike = jnp.float32, remat: str = "none", rngs: RngsLike
    ) -> None:
        check_remat(remat)
        self.config, self.dtype = config, dtype
        rngs = Keys(rngs)
        self.encoder = Encoder(config, remat=remat, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, remat=remat, dtype=dtype, rngs=rngs)
        latent = config.latent_channels
        options = {"dtype": dtype, "rngs": rngs}
        self.quant_conv = Conv(2 * latent, 2 * latent, 1, **options) if config.use_quant_conv else None
        self.post_quant_conv = Conv(latent, latent, 1, **options) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Computes mean and log variance of the latents, not yet scaled.

        Args:
            images: [B, H, W, in_channels] in [-1, 1].

        Returns:
            mean, logvar: float32 [B, H / d, W / d, latent_channels], d = config.downsampling (rounded down);
            logvar in [-30, 20].
        """
        _check_channels("images", images, self.config.in_channels)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decodes latents to images.

        Args:
            latents: [B, h, w, latent_channels], unscaled, as `encode` returns them.

        Returns:
            float32 [B, h * d, w * d, out_channels], roughly in [-1, 1], not clipped; d = config.downsampling.
        """
        _check_channels("latents", latents, self.config.latent_channels)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)


def _check_channels(name, array, channels):
    if array.ndim != 4 or array.shape[-1] != channels:
        raise ValueError(f"{name} should be [B, height, width, {channels}], not {list(array.shape)}")
