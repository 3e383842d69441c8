"""Sizes of the transformers of Stable Diffusion 3 and 3.5."""

import dataclasses
from typing import Any

from imagereward_jax.models.config import check_choice, check_positive, read_config, write_config

# config.json of the published models, without default values.
SD3_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}


@dataclasses.dataclass(frozen=True)
class SD3Transformer2DConfig:
    """config.json of the transformer; the defaults are diffusers', as old files omit some fields.

    sample_size: latent pixels along each side that positions are spaced for, if the position table is not read.
    caption_projection_dim: width of the text tokens, the same as that of the image tokens. pos_embed_max_size: patches
    along each side of the position table. dual_attention_layers: indices of the layers with a second attention.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        check_positive(
            self, "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim",
            "num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
            "out_channels", "pos_embed_max_size",
        )  # fmt: skip
        check_choice(type(self), "qk_norm", self.qk_norm, (None, "rms_norm"))
        if self.caption_projection_dim != self.features:
            raise ValueError(
                f"SD3Transformer2DConfig: caption_projection_dim={self.caption_projection_dim} should be "
                f"num_attention_heads * attention_head_dim = {self.features}"
            )
        if self.features % 4:
            raise ValueError(
                f"SD3Transformer2DConfig: num_attention_heads * attention_head_dim = {self.features} should be a "
                "multiple of 4, for sines and cosines of rows and columns"
            )
        if unknown := [index for index in self.dual_attention_layers if index not in range(self.num_layers)]:
            raise ValueError(
                f"SD3Transformer2DConfig: dual_attention_layers has {unknown[0]!r}, and num_layers={self.num_layers}"
            )

    @property
    def features(self) -> int:
        """Width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SD3Transformer2DConfig":
        """Reads the content of config.json; ValueError names a field and value that are not implemented."""
        return read_config(cls, values, fixed={})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of config.json, as diffusers reads it."""
        return {"_class_name": "SD3Transformer2DModel", **write_config(self)}
