"""Residual and resampling blocks of diffusers' UNet and VAE. Images are [B, H, W, C]."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models.layers import Conv, GroupNorm, Linear, Padding, RngsLike
from imagereward_jax.models.remat import call_with_remat, remat_mode
from imagereward_jax.models.sharding import shard_batch


class ResnetBlock2D(nnx.Module):
    """Two normalised 3 x 3 convolutions around a skip connection, shifted by the time embedding if there is one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_features: int | None = None,
        groups: int,
        eps: float,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.mode = remat_mode(remat, "blocks")
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, dtype=dtype)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1, dtype=dtype, rngs=rngs)
        timed = time_features is not None
        self.time_emb_proj = Linear(time_features, out_channels, dtype=dtype, rngs=rngs) if timed else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, dtype=dtype)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1, dtype=dtype, rngs=rngs)
        widens = in_channels != out_channels
        self.conv_shortcut = Conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs) if widens else None

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x: [B, H, W, in_channels]; time: [B, time_features] after SiLU. Returns [B, H, W, out_channels]."""
        return call_with_remat(self._forward, x, time, mode=self.mode)

    def _forward(self, x, time):
        y = shard_batch(self.conv1(jax.nn.silu(self.norm1(x))))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(time)[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return shard_batch(y + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Downsample2D(nnx.Module):
    """Halves height and width (rounded up in the UNet) by a strided convolution.

    Args:
        padding: 1 as in the UNet, or ((0, 1), (0, 1)) as in the VAE.
    """

    def __init__(
        self,
        channels: int,
        *,
        padding: int | Padding = 1,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: RngsLike,
    ) -> None:
        self.mode = remat_mode(remat, "blocks")
        self.conv = Conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return call_with_remat(lambda x: shard_batch(self.conv(x)), x, mode=self.mode)


class Upsample2D(nnx.Module):
    """Doubles height and width (nearest neighbour), then convolves."""

    def __init__(self, channels: int, *, remat: str = "none", dtype: DTypeLike = jnp.float32, rngs: RngsLike) -> None:
        self.mode = remat_mode(remat, "blocks")
        self.conv = Conv(channels, channels, 3, padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        """x: [B, H, W, C]; size: the output's height and width, 2 H or 2 H - 1 (the same for W); None doubles."""
        return call_with_remat(lambda x: shard_batch(self.conv(nearest_double(x, size))), x, mode=self.mode)


def last_layers(network: nnx.Module, x: jax.Array) -> jax.Array:
    """Applies the final norm, SiLU and convolution of a UNet, encoder or decoder, by the network's `mode`."""
    finish = lambda x: network.conv_out(jax.nn.silu(network.conv_norm_out(x)))  # noqa: E731
    return call_with_remat(finish, x, mode=network.mode)


def nearest_double(x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Doubles x [B, H, W, C] by repeating pixels, cropped to `size` (height, width)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    x = x.reshape(batch, 2 * height, 2 * width, channels)
    # Nearest-neighbour resizing to 2 n - 1 gives the same pixels as doubling without the last.
    return x if size is None else x[:, : size[0], : size[1]]
