"""Names of a model's layers in adapter files.

Three layouts occur: PEFT's, which diffusers writes (`unet.MODULE.lora_A.weight`), an older one of diffusers
(`unet.MODULE.lora.down.weight`), and that of kohya's sd-scripts (`lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight`
and `.alpha`), which for SDXL numbers the blocks as Stability's code does (`input_blocks_4_1` and so on).
"""

import re
from collections.abc import Mapping

from flax import nnx

from imagereward_jax.models import lora

_KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_KEY = re.compile(
    r"(?P<name>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.\w+)?\.weight|(?P<scaled>.+)\.(?P<alpha>alpha)"
)


def parse_key(key: str) -> tuple[str, str] | None:
    """Splits a key into the file's name of the layer and "down", "up" or "alpha"; None for a key of another kind."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    if match["alpha"]:
        return match["scaled"], "alpha"
    return match["name"], "down" if match["down"] else "up"


def layer_aliases(networks: Mapping[str, nnx.Module]) -> dict[str, tuple[str, str]]:
    """Maps every name that an adapter file may give a layer to (network, name there).

    Args:
        networks: the model's networks by name.
    """
    aliases = {}
    for network, module in networks.items():
        for name in lora.slots(module):
            spellings = [f"{network}.{name}"]
            if name.startswith("text_model."):
                spellings.append(f"{network}.{name.removeprefix('text_model.')}")
            if network == "unet":
                spellings += [name, f"base_model.model.{name}"]
            kohya = [name]
            if network == "unet" and (stability := _stability_name(name, module.config)):
                kohya.append(stability)
            spellings += [prefix + each.replace(".", "_") for prefix in _KOHYA.get(network, ()) for each in kohya]
            aliases |= dict.fromkeys(spellings, (network, name))
    return aliases


def _stability_name(name, config):
    """The name of a layer of the UNet's attention in Stability's code; None for layers elsewhere."""
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0.", "middle_block.1.")
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", name)
    layers = config.layers_per_block
    if match is None or not isinstance(layers, int):
        return None
    side, (block, layer), rest = match[1], map(int, match.group(2, 3)), match[4]
    index = block * (layers + 1) + layer
    return f"input_blocks.{index + 1}.1.{rest}" if side == "down" else f"output_blocks.{index}.1.{rest}"
