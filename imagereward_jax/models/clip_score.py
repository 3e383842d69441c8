"""CLIP's two encoders and the scores based on them: CLIP score, PickScore, HPSv2 and the aesthetic predictor.

Attribute names are the keys of transformers' `CLIPModel`. CLIP: arXiv 2103.00020.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import layers
from imagereward_jax.models.blip import RewardHead
from imagereward_jax.models.clip import ACTIVATIONS, CLIPEncoder, CLIPTextConfig, CLIPTextTransformer
from imagereward_jax.models.config import check_choice, check_positive


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a CLIP vision transformer, named as in config.json; the defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_positive(
            self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
            "patch_size",
        )  # fmt: skip
        check_choice(type(self), "hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig: num_attention_heads={self.num_attention_heads} must divide hidden_size="
                f"{self.hidden_size}, and patch_size={self.patch_size} image_size={self.image_size}"
            )

    @property
    def tokens(self) -> int:
        """Image tokens, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both encoders and of their common space.

    Attributes:
        scaled: whether the cosine is multiplied by the learnt scale exp(logit_scale) (PickScore).
    """

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    projection_dim: int = 512
    scaled: bool = False


class CLIPVisionEmbeddings(nnx.Module):
    """Class token and patches of the pixels, plus position embeddings."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        self.dtype, width = dtype, config.hidden_size
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.patch_embedding = layers.Conv(
            3, width, config.patch_size, stride=config.patch_size, bias=False, dtype=dtype, rngs=rngs
        )
        self.position_embedding = layers.Embedding(config.tokens, width, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(len(patches), -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (len(patches), 1, patches.shape[-1]))
        tokens = jnp.concatenate([first, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionTransformer(nnx.Module):
    """Normalised pixels [B, S, S, 3] -> the normed class token [B, hidden_size]."""

    def __init__(self, config: CLIPVisionConfig, *, dtype: DTypeLike, rngs: layers.RngsLike) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = CLIPVisionEmbeddings(config, dtype=dtype, rngs=rngs)
        self.pre_layrnorm = layers.LayerNorm(width, eps=eps, dtype=dtype)  # the checkpoints' spelling
        self.encoder = CLIPEncoder(config, causal=False, dtype=dtype, rngs=rngs)
        self.post_layernorm = layers.LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        last, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(last[:, 0])


class CLIPImageEncoder(nnx.Module):
    """CLIP's image encoder and its projection."""

    def __init__(self, config: CLIPConfig, *, dtype: DTypeLike = jnp.float32, rngs: layers.RngsLike) -> None:
        self.config = config
        rngs = layers.Keys(rngs)
        self.vision_model = CLIPVisionTransformer(config.vision, dtype=dtype, rngs=rngs)
        self.visual_projection = layers.Linear(
            config.vision.hidden_size, config.projection_dim, bias=False, dtype=dtype, rngs=rngs
        )

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> unit vectors [B, projection_dim] float32."""
        return layers.unit(self.visual_projection(self.vision_model(pixels)))


class CLIPScoreModel(CLIPImageEncoder):
    """Agreement of prompt and image: the cosine of their embeddings, times the learnt scale if `scaled`."""

    def __init__(self, config: CLIPConfig, *, dtype: DTypeLike = jnp.float32, rngs: layers.RngsLike) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        text, rngs = config.text, layers.Keys(rngs)
        self.text_model = CLIPTextTransformer(text, dtype=dtype, rngs=rngs)
        self.text_projection = layers.Linear(
            text.hidden_size, config.projection_dim, bias=False, dtype=dtype, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(1 / 0.07)))

    def score_prompts(self, image_embeds: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Scores [B] float32 of `encode_images`' vectors for prompts.

        Args:
            input_ids: [B, L] integers; tokens after the end-of-text token are ignored.
        """
        text_embeds = layers.unit(self.text_projection(self.text_model(input_ids).pooled))
        cosine = (image_embeds * text_embeds).sum(-1)
        return cosine * jnp.exp(self.logit_scale[...]) if self.config.scaled else cosine


class AestheticModel(CLIPImageEncoder):
    """LAION's aesthetic predictor: the beauty of an image, about 1 to 10, independent of the prompt.

    `mlp.layers` is `sac+logos+ava1-l14-linearMSE.pth`: Linear layers without activations over CLIP's unit vectors.
    """

    head_sizes = (1024, 128, 64, 16)

    def __init__(self, config: CLIPConfig, *, dtype: DTypeLike = jnp.float32, rngs: layers.RngsLike) -> None:
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.mlp = RewardHead(config.projection_dim, self.head_sizes, rngs=rngs)

    def score_prompts(self, image_embeds: jax.Array) -> jax.Array:
        """Scores [B] float32 of `encode_images`' vectors."""
        return self.mlp(image_embeds)
