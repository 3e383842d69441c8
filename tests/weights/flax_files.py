"""Weights as diffusers' and transformers' Flax models saved them."""

import json
import re

import numpy as np


def flax_tree(network, rename):
    """A PyTorch network's parameters as diffusers' Flax models kept them, laid out by the kind of each layer."""
    import torch

    tree = {}
    for path, layer in network.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            array = parameter.detach().numpy()
            if isinstance(layer, torch.nn.Conv2d) and kind == "weight":
                kind, array = "kernel", array.transpose(2, 3, 1, 0)
            elif isinstance(layer, torch.nn.Linear) and kind == "weight":
                kind, array = "kernel", array.T
            elif isinstance(layer, torch.nn.Embedding):
                kind = "embedding"
            elif kind == "weight":
                kind = "scale"
            node = tree
            for part in rename(path).split("."):
                node = node.setdefault(part, {})
            node[kind] = np.ascontiguousarray(array)
    return tree


def numbers_joined(path):
    """down_blocks.0.attentions.1.to_out.0 -> down_blocks_0.attentions_1.to_out_0"""
    return re.sub(r"\.(\d+)", r"_\1", path)


def old_vae_names(path):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        path = re.sub(rf"(attentions\.\d+)\.{re.escape(new)}$", rf"\1.{old}", path)
    return path


FILES = {  # by component: file, the path of a PyTorch layer to that of Flax's, fields of config.json
    "unet": ("diffusion_flax_model.msgpack", numbers_joined, {"split_head_dim": False}),
    "vae": ("diffusion_flax_model.msgpack", lambda path: numbers_joined(old_vae_names(path)), {}),
    "text_encoder": ("flax_model.msgpack", lambda path: f"text_model.{path.removeprefix('text_model.')}", {}),
}


def write(folder, network):
    """Writes a PyTorch network's weights into its component's folder, whose config.json gets the fields of Flax."""
    from flax.serialization import msgpack_serialize

    file, rename, fields = FILES[folder.name]
    (folder / file).write_bytes(msgpack_serialize(flax_tree(network, rename)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
