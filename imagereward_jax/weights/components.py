"""Which network reads which component of a pipeline."""

import jax.numpy as jnp
from flax import nnx

from imagereward_jax.models import clip, unet, vae
from imagereward_jax.weights import mapping

_NETWORKS = {
    "unet": (unet.UNet2DConditionConfig, unet.UNet2DConditionModel),
    "vae": (vae.AutoencoderKLConfig, vae.AutoencoderKL),
    "text_encoder": (clip.CLIPTextConfig, clip.CLIPTextModel),
    "text_encoder_2": (clip.CLIPTextConfig, clip.CLIPTextModelWithProjection),
}


def read_settings(name, config):
    """The config dataclass of a component: "unet", "vae", "text_encoder" or "text_encoder_2".

    Args:
        config: the content of its config.json.

    Raises:
        ValueError: a setting that is not implemented.
    """
    return _NETWORKS[name][0].from_dict(config)


def build_network(name, settings, *, rngs, dtype=jnp.float32, remat="none"):
    """The network of a component with random weights.

    Args:
        settings: from `read_settings`. rngs: `nnx.Rngs`.
        dtype: of the arithmetic. remat: see `models.remat`; text encoders, through which no gradient goes, have none.
    """
    options = {"remat": remat} if name in ("unet", "vae") else {}
    return _NETWORKS[name][1](settings, dtype=dtype, rngs=rngs, **options)


def abstract_network(name, config):
    """The network of a component, with shapes instead of arrays.

    Args:
        name, config: as for `read_settings`.

    Raises:
        ValueError: a setting that is not implemented.
    """
    settings = read_settings(name, config)
    return mapping.abstract(lambda: build_network(name, settings, rngs=nnx.Rngs(0)))
