"""Names of weights in Stability's code, from those of diffusers: single-file checkpoints and many adapters have them.

Each function takes a key of the diffusers network and returns its `Origin`, the place in Stability's layout; or the key
itself if there is no rule for it, so that the mapping reports it.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Origin(NamedTuple):
    """The place of a tensor in Stability's layout.

    Attributes:
        key: of the tensor there.
        third: 0, 1 or 2 if the tensor is that third of the rows there (query, key, value); None for all rows.
        swapped: whether the halves of the rows (shift, scale) have changed places.
        transposed: whether a matrix is transposed there.
        convolution: whether a matrix is a 1x1 convolution there.
    """

    key: str
    third: int | None = None
    swapped: bool = False
    transposed: bool = False
    convolution: bool = False

    def read(self, stored: Any) -> np.ndarray:
        """Makes the tensor of diffusers from the one of Stability's layout."""
        array = np.asarray(stored)
        if self.convolution and array.ndim == 4:
            array = array.reshape(array.shape[:2])
        return self.rows(array.T if self.transposed else array)

    def write(self, array: np.ndarray) -> np.ndarray:
        """Makes the tensor of Stability's layout, or its third, from diffusers' one; the inverse of `read`."""
        array = swap_halves(array) if self.swapped else np.asarray(array)
        array = array.T if self.transposed else array
        return array.reshape(*array.shape, 1, 1) if self.convolution and array.ndim == 2 else array

    def rows(self, array: np.ndarray) -> np.ndarray:
        """The rows of diffusers' tensor, from those of Stability's."""
        if self.third is not None:
            size = array.shape[0] // 3
            array = array[self.third * size : (self.third + 1) * size]
        return swap_halves(array) if self.swapped else array


def swap_halves(array: np.ndarray) -> np.ndarray:
    """Swaps the first half of the rows with the second."""
    half = array.shape[0] // 2
    return np.concatenate([array[half:], array[:half]])


Naming = Callable[[str, Any], Origin]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}


def unet(key: str, config: Any) -> Origin:
    """The origin of a tensor of `UNet2DConditionModel`. config: its settings."""
    layer, _, kind = key.rpartition(".")
    return Origin(f"{_unet_layer(layer, config)}.{kind}")


def _unet_layer(layer, config):
    if layer in _UNET:
        return _UNET[layer]
    if match := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", layer):
        return f"{_MIDDLE.get(match[1], match[1])}.{_RESNET.get(match[2], match[2])}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer)
    count = config.layers_per_block
    if match is None or not isinstance(count, int):
        return layer
    side, kind, rest = match[1], match[3], match[5]
    block, index = int(match[2]), int(match[4])
    # Down blocks come after conv_in and end in a place for the downsampler; up blocks have one layer more.
    place = block * (count + 1) + (side == "down") + (count if kind in ("downsamplers", "upsamplers") else index)
    if kind == "downsamplers":
        return f"input_blocks.{place}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{place}.{2 if 'Attn' in config.up_block_types[block] else 1}.{rest}"
    part = "1" if kind == "attentions" else "0"
    inner = _RESNET.get(rest, rest) if kind == "resnets" else rest
    return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{part}.{inner}"


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae(key: str, config: Any) -> Origin:
    """The origin of a tensor of `AutoencoderKL`."""
    layer, _, kind = key.rpartition(".")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", layer):
        name = _VAE_ATTENTION.get(match[2], match[2])
        return Origin(f"{match[1]}.mid.attn_1.{name}.{kind}", convolution=kind == "weight" and name != "norm")
    layer = layer.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    layer = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", layer)
    layer = re.sub(r"down_blocks\.(\d+)", r"down.\1", layer)
    last = len(config.block_out_channels) - 1
    layer = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", layer)
    layer = re.sub(r"(down|up)samplers\.0", r"\1sample", layer.replace("resnets", "block"))
    return Origin(f"{layer}.{kind}")


_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(key: str, config: Any) -> Origin:
    """The origin of a tensor of `CLIPTextModel` in OpenCLIP's text tower."""
    if key in _OPEN_CLIP:
        return Origin(_OPEN_CLIP[key])
    if key == "text_projection.weight":  # multiplies from the right there
        return Origin("text_projection", transposed=True)
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return Origin(key)
    number, layer, kind = match.groups()
    prefix = f"transformer.resblocks.{number}."
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return Origin(f"{prefix}attn.in_proj_{kind}", third="qkv".index(projection[1]))
    return Origin(f"{prefix}{_OPEN_CLIP_LAYER.get(layer, layer)}.{kind}")


_MMDIT = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
# Layer of a block: (its name, the third of a joint projection).
_MMDIT_BLOCK = {
    "attn.to_q": ("x_block.attn.qkv", 0),
    "attn.to_k": ("x_block.attn.qkv", 1),
    "attn.to_v": ("x_block.attn.qkv", 2),
    "attn.add_q_proj": ("context_block.attn.qkv", 0),
    "attn.add_k_proj": ("context_block.attn.qkv", 1),
    "attn.add_v_proj": ("context_block.attn.qkv", 2),
    "attn.to_out.0": ("x_block.attn.proj", None),
    "attn.to_add_out": ("context_block.attn.proj", None),
    "attn.norm_q": ("x_block.attn.ln_q", None),
    "attn.norm_k": ("x_block.attn.ln_k", None),
    "attn.norm_added_q": ("context_block.attn.ln_q", None),
    "attn.norm_added_k": ("context_block.attn.ln_k", None),
    "attn2.to_q": ("x_block.attn2.qkv", 0),
    "attn2.to_k": ("x_block.attn2.qkv", 1),
    "attn2.to_v": ("x_block.attn2.qkv", 2),
    "attn2.to_out.0": ("x_block.attn2.proj", None),
    "attn2.norm_q": ("x_block.attn2.ln_q", None),
    "attn2.norm_k": ("x_block.attn2.ln_k", None),
    "norm1.linear": ("x_block.adaLN_modulation.1", None),
    "norm1_context.linear": ("context_block.adaLN_modulation.1", None),
    "ff.net.0.proj": ("x_block.mlp.fc1", None),
    "ff.net.2": ("x_block.mlp.fc2", None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", None),
    "ff_context.net.2": ("context_block.mlp.fc2", None),
}


def mmdit(key: str, config: Any) -> Origin:
    """The origin of a tensor of `SD3Transformer2DModel`.

    The last modulations, of the output and of the last block's context, are (scale, shift) in diffusers.
    """
    if key == "pos_embed.pos_embed":
        return Origin("pos_embed")
    layer, _, kind = key.rpartition(".")
    if layer in _MMDIT:
        return Origin(f"{_MMDIT[layer]}.{kind}", swapped=layer == "norm_out.linear")
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    if match is None or match[2] not in _MMDIT_BLOCK:
        return Origin(key)
    name, third = _MMDIT_BLOCK[match[2]]
    swapped = match[2] == "norm1_context.linear" and int(match[1]) == config.num_layers - 1
    return Origin(f"joint_blocks.{match[1]}.{name}.{kind}", third=third, swapped=swapped)


def same(key: str, config: Any) -> Origin:
    """The origin of a tensor that has diffusers' or transformers' name: text encoders of Hugging Face."""
    return Origin(key)
