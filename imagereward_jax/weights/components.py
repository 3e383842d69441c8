"""The networks that pipelines are made of, by the class that model_index.json names."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import clip, mmdit, mmdit_config, t5, unet, unet_config, vae
from imagereward_jax.weights import mapping


class Component(NamedTuple):
    """One class of network: its config dataclass, its module, and the PyTorch library that has it.

    remat: whether it takes `remat` (text encoders, through which no gradient flows, do not).
    """

    config: type
    network: type
    library: str
    remat: bool = False


COMPONENTS = {
    "UNet2DConditionModel": Component(
        unet_config.UNet2DConditionConfig, unet.UNet2DConditionModel, "diffusers", remat=True
    ),
    "SD3Transformer2DModel": Component(
        mmdit_config.SD3Transformer2DConfig, mmdit.SD3Transformer2DModel, "diffusers", remat=True
    ),
    "AutoencoderKL": Component(vae.AutoencoderKLConfig, vae.AutoencoderKL, "diffusers", remat=True),
    "CLIPTextModel": Component(clip.CLIPTextConfig, clip.CLIPTextModel, "transformers"),
    "CLIPTextModelWithProjection": Component(clip.CLIPTextConfig, clip.CLIPTextModelWithProjection, "transformers"),
    "T5EncoderModel": Component(t5.T5Config, t5.T5EncoderModel, "transformers"),
}


def is_component(class_name: Any) -> bool:
    """Whether a class is in the table; its Flax version is the same network."""
    return str(class_name).removeprefix("Flax") in COMPONENTS


def torch_class(class_name: str, what: str) -> str:
    """The PyTorch name of a class, its key in the table.

    Args:
        what: how an error names where the class was read.

    Raises:
        ValueError: the class is not implemented.
    """
    if not is_component(class_name):
        raise ValueError(f"{what}: the class {class_name!r} is not implemented, only {', '.join(COMPONENTS)}")
    return class_name.removeprefix("Flax")


def class_of(config: dict, what: str) -> str:
    """The class that a config.json states: `_class_name` of diffusers, `architectures` of transformers.

    Raises:
        ValueError: it states none, or one that is not implemented.
    """
    listed = config.get("architectures")
    name = config.get("_class_name") or (listed[0] if isinstance(listed, list | tuple) and listed else None)
    if not isinstance(name, str):
        raise ValueError(f"{what}: config.json states no class; expected _class_name or architectures")
    return torch_class(name, what)


def label(class_name: str) -> dict[str, Any]:
    """The fields of config.json that state the class."""
    if COMPONENTS[class_name].library == "diffusers":
        return {"_class_name": class_name}
    return {"architectures": [class_name]}


def read_settings(class_name: str, config: dict, where: str = "") -> Any:
    """Reads the config dataclass of a network.

    Args:
        config: the content of its config.json. where: how an error names the file.

    Raises:
        ValueError: a setting that is not implemented, or of another type.
    """
    # Some programs write "architectures": null; the class is known here.
    stated = {name: value for name, value in config.items() if name != "architectures" or value is not None}
    try:
        return COMPONENTS[class_name].config.from_dict(stated)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def build_network(
    class_name: str, settings: Any, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, remat: str = "none"
) -> nnx.Module:
    """Builds a network with random weights.

    Args:
        settings: from `read_settings`. dtype: of the arithmetic. remat: see `models.remat`.
    """
    component = COMPONENTS[class_name]
    options = {"remat": remat} if component.remat else {}
    return component.network(settings, dtype=dtype, rngs=rngs, **options)


def abstract_network(class_name: str, config: dict) -> nnx.Module:
    """Builds a network with shapes instead of arrays.

    Args:
        class_name, config: as for `read_settings`.

    Raises:
        ValueError: a setting that is not implemented.
    """
    settings = read_settings(class_name, config)
    return mapping.abstract(lambda: build_network(class_name, settings, rngs=nnx.Rngs(0)))
