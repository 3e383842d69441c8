"""Names of a model's layers in adapter files, and of the tensors of a layer.

Five layouts occur. PEFT's, which diffusers writes (`unet.MODULE.lora_A.weight`). Two older ones of diffusers
(`unet.MODULE.lora.down.weight`, and in 2023 `unet.ATTENTION.processor.to_q_lora.down.weight`). That of kohya's
sd-scripts, LyCORIS and OneTrainer (`lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight` and `.alpha`). And ComfyUI's
(`diffusion_model.MODULE.lora_A.weight`). The last two often have the modules' names in Stability's code
(`stability_names`), where query, key and value may be one layer.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx

from imagereward_jax.models import lora
from imagereward_jax.weights import stability_names
from imagereward_jax.weights.stability_names import Origin

# By network, what comes before a module's name with its dots, and with underscores in their place.
_DOTTED = {
    "unet": ("unet.", "", "base_model.model."),
    "transformer": ("transformer.", "", "base_model.model."),
    "text_encoder": ("text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer."),
}
_FLAT = {
    "unet": ("lora_unet_", "lycoris_"),
    "transformer": ("lora_transformer_", "lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
_STABILITY_DOTTED = ("diffusion_model.", "model.diffusion_model.", "")
_STABILITY_FLAT = ("lora_unet_", "lycoris_")
_NAMING = {"unet": stability_names.unet, "transformer": stability_names.mmdit}
_KEY = re.compile(
    r"(?P<name>.+?)\.(?:"
    r"(?P<down>(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)(?:\.\w+)?\.weight)"
    r"|(?P<up>(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)(?:\.\w+)?\.weight)"
    r"|(?P<core>lora_mid\.weight)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.\w+)?)"
    r"|(?P<factor>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])|diff)(?:\.weight)?"
    r"|(?P<alpha>alpha))"
)
_PROCESSOR = re.compile(r"\.(processor\.|self_attn\.)to_(q|k|v|out)_lora\.")
# Formats that are not read, by marks in their keys.
_FORMATS = (
    (r"emb_params|string_to_|^clip_[lg]$", "an embedding of textual inversion, which is not implemented"),
    (r"\.on_input$|ia3_l", "(IA)3, which is not implemented"),
    (r"oft_|boft", "OFT, which is not implemented"),
    (r"\.[ab][12]\.weight$", "GLoRA, which is not implemented"),
    (r"\.diff_b$|\.lora_B\.bias|lora_bias|\.[wb]_norm$|set_weight", "differences of biases or norms, not implemented"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "an adapter of Flux's family, not this model's"),
    (r"lora_controlnet|controlnet", "a ControlNet, which is not implemented"),
    (r"motion_modules", "a motion adapter of AnimateDiff, which is not implemented"),
    (r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.", "a whole checkpoint: pass it as the model"),
)


class Target(NamedTuple):
    """A layer of the model that a layer of a file adapts; origin: the part of its rows, None for the same layer."""

    network: str
    layer: str
    origin: Origin | None = None


def parse_key(key: str) -> tuple[str, str] | None:
    """Splits a key into the file's name of the layer and the tensor's role; None for a key of another kind.

    Roles are "down", "up", "core", "magnitude", "alpha", and the factors of LyCORIS by their own names. PEFT's vector
    of DoRA is "magnitude.rows".
    """
    match = _KEY.fullmatch(_PROCESSOR.sub(_modern_attention, key))
    if match is None:
        return None
    role = match["factor"] or match.lastgroup
    return match["name"], "magnitude.rows" if "lora_magnitude" in (match["magnitude"] or "") else role


def _modern_attention(match):
    """The layer's own name for what attention processors of 2023 called `to_q_lora`."""
    name = match[2]
    if match[1] == "processor.":
        return f".to_{name}{'.0' if name == 'out' else ''}.lora."
    return f".self_attn.{name}_proj.lora."


def unread_format(keys: list[str]) -> str:
    """Says of which format keys are that fit no layer of the model."""
    for pattern, name in _FORMATS:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "layers that this model lacks: made for another model or family?"


def layer_aliases(networks: Mapping[str, nnx.Module]) -> dict[str, list[Target]]:
    """Maps every name that an adapter file may give a layer to the model's layers that it stands for.

    Args:
        networks: the model's networks by name.
    """
    aliases = defaultdict(list)
    for network, module in networks.items():
        for name in lora.slots(module):
            for alias in _own_names(network, name):
                aliases[alias] = [Target(network, name)]
        if network not in _NAMING:
            continue
        for name in lora.slots(module):
            origin = _NAMING[network](f"{name}.weight", module.config)
            stability = origin.key.removesuffix(".weight")
            spellings = [prefix + stability for prefix in _STABILITY_DOTTED]
            spellings += [prefix + stability.replace(".", "_") for prefix in _STABILITY_FLAT]
            for alias in spellings:
                if Target(network, name) not in aliases[alias]:
                    aliases[alias].append(Target(network, name, origin))
    return dict(aliases)


def _own_names(network, name):
    names = [name, *([name.removeprefix("text_model.")] if name.startswith("text_model.") else [])]
    dotted = [prefix + each for prefix in _DOTTED.get(network, ()) for each in names]
    return dotted + [prefix + name.replace(".", "_") for prefix in _FLAT.get(network, ())]
