"""The settings of a `UNet2DConditionModel`, and those of the published networks."""

import dataclasses
from typing import Any

from imagereward_jax.models.config import (
    Fixed,
    check_all_positive,
    check_choice,
    check_positive,
    read_config,
    write_config,
)

NO_ATTENTION = "UNetMidBlock2D"
_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", NO_ATTENTION, None)
_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")
_DEPTHS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")  # of down blocks, of up blocks
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
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
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
    `transformer_layers_per_block` and `layers_per_block` are one number, or one per down block. UNets of which layers
    were pruned (SSD-1B) have a list of numbers for each transformer of a block, and one of lists, coarsest first, for
    the up blocks: `reverse_transformer_layers_per_block`.
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
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
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
        check_choice(type(self), "mid_block_type", self.mid_block_type, _MID_BLOCKS)
        check_choice(type(self), "addition_embed_type", self.addition_embed_type, (None, "text_time"))
        if self.sample_size is not None:
            check_all_positive(self, "sample_size")
        if self.addition_embed_type is not None:
            check_positive(self, "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        for name in ("layers_per_block", *_DEPTHS, "attention_head_dim"):
            if isinstance(getattr(self, name), tuple):
                self._check_length(name, levels)
        self._check_depths()
        self._check_divisible()

    def _check_length(self, name, levels):
        value = getattr(self, name)
        if len(value) != levels:
            raise ValueError(
                f"UNet2DConditionConfig: {name}={value!r} should have {levels} items, as block_out_channels has"
            )

    def _check_depths(self):
        """Raises ValueError for numbers of transformer layers that are none, or not as many as the block's layers."""
        for up, name in enumerate(_DEPTHS):
            for level in range(len(self.block_out_channels)):
                depths, layers = self.transformer_depths(level, up=bool(up)), self.per_level("layers_per_block")[level]
                if len(depths) != layers + up or any(depth < 0 for depth in depths):
                    raise ValueError(
                        f"UNet2DConditionConfig: {name}={getattr(self, name)!r}: level {level} has {depths}, expected "
                        f"{layers + up} whole numbers (lists in transformer_layers_per_block need "
                        "reverse_transformer_layers_per_block beside them)"
                    )

    def _check_divisible(self):
        for kernel in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, kernel) % 2 == 0:
                raise ValueError(f"UNet2DConditionConfig: {kernel}={getattr(self, kernel)} should be odd")
        for channels, heads in zip(self.block_out_channels, self.per_level("attention_head_dim")):
            if channels % heads:
                raise ValueError(
                    f"UNet2DConditionConfig: attention_head_dim={heads} (the number of heads) does not divide "
                    f"{channels} of block_out_channels"
                )

    def per_level(self, name: str) -> tuple[Any, ...]:
        """Returns the field `name` as one number (or tuple of them) per level, finest first."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def transformer_depths(self, level: int, *, up: bool = False) -> tuple[int, ...]:
        """Numbers of layers of the transformers of a level's down block, or up block, in which there is one more."""
        stated = self.per_level("transformer_layers_per_block")[level]
        if up and self.reverse_transformer_layers_per_block:
            stated = self.reverse_transformer_layers_per_block[-1 - level]
        count = self.per_level("layers_per_block")[level] + up
        return stated if isinstance(stated, tuple) else (stated,) * count

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UNet2DConditionConfig":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        return read_config(cls, values, fixed=_FIXED)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as diffusers reads it."""
        return {"_class_name": "UNet2DConditionModel", **write_config(self)}
