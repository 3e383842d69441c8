"""Which network reads which component of a pipeline."""

from flax import nnx

from imagereward_jax.models import clip, unet, vae
from imagereward_jax.weights import mapping

_NETWORKS = {
    "unet": (unet.UNet2DConditionConfig, unet.UNet2DConditionModel),
    "vae": (vae.AutoencoderKLConfig, vae.AutoencoderKL),
    "text_encoder": (clip.CLIPTextConfig, clip.CLIPTextModel),
    "text_encoder_2": (clip.CLIPTextConfig, clip.CLIPTextModelWithProjection),
}


def abstract_network(name, config):
    """The network of a component, with shapes instead of arrays.

    Args:
        name: "unet", "vae", "text_encoder" or "text_encoder_2".
        config: the content of its config.json.

    Raises:
        ValueError: a setting that is not implemented.
    """
    config_class, network = _NETWORKS[name]
    settings = config_class.from_dict(config)
    return mapping.abstract(lambda: network(settings, rngs=nnx.Rngs(0)))
