"""Sizes of the ImageReward network (`imagereward_jax.models.blip`), read from and written to JSON."""

import dataclasses
from typing import Any

from imagereward_jax.models.config import check_types

TEXT_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "add_cross_attention": True,
    "is_decoder": False,
    "pad_token_id": 0,
}
# Fields without effect: dropout is off, there is no segment embedding, encoder_width is always the vision width (as in
# BLIP), and the rest is bookkeeping.
TEXT_IGNORED = {
    "architectures",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "encoder_width",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "initializer_range",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "type_vocab_size",
    "use_cache",
}


def _positive(where, **sizes):
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a positive whole number, not {value!r}")


def _known_fields(cls, values, where):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r:.100}: expected an object")
    names = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in names:
            raise ValueError(f"{where}: unknown field {name!r} = {values[name]!r}; known: {', '.join(sorted(names))}")
    return check_types(cls, values, where)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision transformer; the defaults are ViT-L/16 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        sizes.pop("layer_norm_eps")
        _positive("vision config", **sizes)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision config: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"vision config: heads {self.heads} does not divide width {self.width}")

    @property
    def tokens(self) -> int:
        """Image tokens, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the BERT encoder, named as in `med_config.json`; the defaults are ImageReward v1.0."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        sizes.pop("layer_norm_eps")
        _positive("text config", **sizes)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "med_config") -> "TextConfig":
        """Reads the fields of a `med_config.json`.

        Raises:
            ValueError: a field or value is not implemented; the message names it.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {values!r:.100}: expected an object")
        values = {name: value for name, value in values.items() if name not in TEXT_IGNORED}
        for name, expected in TEXT_FIXED.items():
            if values.pop(name, expected) != expected:
                raise ValueError(f"{where}: {name} must be {expected!r}; other values are not implemented")
        return cls(**_known_fields(cls, values, where))

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a `med_config.json`."""
        return {"model_type": "bert", **dataclasses.asdict(self), **TEXT_FIXED}


@dataclasses.dataclass(frozen=True)
class BlipScoreConfig:
    """BLIP's two encoders and projections; the defaults are BLIP large (`model_large.pth`).

    Attributes:
        projection_dim: width of the space in which images and prompts are compared.
        max_prompt_tokens: prompts are padded or truncated to this length.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = 256
    max_prompt_tokens: int = 35


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """Sizes and score statistics of the scorer; the defaults are ImageReward v1.0.

    Attributes:
        projection_dim: width of BLIP's two contrastive projections; they are in the checkpoint, the score does not use
            them.
        head_sizes: output sizes of the head's linear layers, without the last (1).
        max_prompt_tokens: prompts are padded or truncated to this length.
        score_mean, score_std: the score is `(head - score_mean) / score_std`.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = 256
    head_sizes: tuple[int, ...] = (1024, 128, 64, 16)
    max_prompt_tokens: int = 35
    score_mean: float = 0.16717362830052426
    score_std: float = 1.0333394966054072

    def __post_init__(self):
        object.__setattr__(self, "head_sizes", tuple(self.head_sizes))
        sizes = {f"head_sizes[{i}]": size for i, size in enumerate(self.head_sizes)}
        _positive("config", projection_dim=self.projection_dim, max_prompt_tokens=self.max_prompt_tokens, **sizes)
        if len(self.head_sizes) != 4:
            raise ValueError(f"config: head_sizes must hold 4 numbers, not {list(self.head_sizes)}")
        if self.max_prompt_tokens > self.text.max_position_embeddings:
            raise ValueError(
                f"config: max_prompt_tokens {self.max_prompt_tokens} is more than the "
                f"{self.text.max_position_embeddings} positions of the text encoder"
            )
        if not self.score_std > 0:
            raise ValueError(f"config: score_std must be above 0, not {self.score_std!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> "ImageRewardConfig":
        """Builds a config from the dict that `to_dict` returns.

        Raises:
            ValueError: a field or value is not implemented; the message names it.
        """
        values = dict(values)
        model_type = values.pop("model_type", "imagereward")
        if model_type != "imagereward":
            raise ValueError(f"{where}: model_type must be 'imagereward', not {model_type!r}")
        vision = _known_fields(VisionConfig, values.pop("vision", {}), f"{where}: vision")
        text = TextConfig.from_dict(values.pop("text", {}), f"{where}: text")
        values = _known_fields(cls, values, where)
        return cls(vision=VisionConfig(**vision), text=text, **values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a config.json."""
        values = dataclasses.asdict(self)
        values.update(text=self.text.to_dict(), head_sizes=list(self.head_sizes))
        return {"model_type": "imagereward", **values}
