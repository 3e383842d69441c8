"""The layouts in which CLIP is published, brought to that of transformers' `CLIPModel`, and the sizes read off it.

OpenAI's files and OpenCLIP's share one set of names (`visual.transformer.resblocks.N.attn.in_proj_weight`).
"""

import re

import numpy as np

from imagereward_jax.weights.files import WeightsError

# What OpenAI's and OpenCLIP's files hold beside weights.
BOOKKEEPING = (r"^(input_resolution|context_length|vocab_size|attn_mask)$",)

_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "logit_scale": "logit_scale",
}
# These two multiply from the right, so they are the transposed weights of Linear layers.
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def to_transformers(tensors):
    """CLIP's tensors under transformers' names, whichever of the layouts they have.

    Names that belong to neither layout stay as they are, for the mapping to report.
    """
    tensors = {key.removeprefix("module."): array for key, array in tensors.items()}
    if "visual.conv1.weight" not in tensors:
        return tensors
    renamed = {}
    for key, array in tensors.items():
        renamed.update(_renamed(key, np.asarray(array)))
    return renamed


def _renamed(key, array):
    """Splits the joint projection of an attention into three tensors; leaves others as one."""
    if key in _NAMES:
        return {_NAMES[key]: array}
    if key in _TRANSPOSED:
        return {_TRANSPOSED[key]: np.ascontiguousarray(array.T)}
    parent, _, kind = key.rpartition(".")
    if parent in _NORMS:
        return {f"{_NORMS[parent]}.{kind}": array}
    block = _BLOCK.fullmatch(key)
    if block is None:
        return {key: array}
    prefix = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
    if block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[3].rpartition("_")[2]
        parts = np.split(array, 3)
        return {f"{prefix}.self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    layer, _, kind = block[3].rpartition(".")
    return {f"{prefix}.{_LAYERS[layer]}.{kind}": array} if layer in _LAYERS else {key: array}


def sizes_of(tensors, what="checkpoint"):
    """The sizes of both towers, read off tensors under transformers' names.

    Returns:
        {"text": {...}, "vision": {...}, "projection_dim"}: config.json's fields, but for heads and activation, which
        weights do not show. Without a text tower, "text" is absent.

    Raises:
        WeightsError: the vision tower is not there.
    """
    patches, positions = (
        f"vision_model.embeddings.{name}.weight" for name in ("patch_embedding", "position_embedding")
    )
    for key in (patches, positions, "visual_projection.weight"):
        if key not in tensors:
            raise WeightsError(f"{what}: not a CLIP checkpoint of a known layout; it has no {key}")
    patch_size = tensors[patches].shape[-1]
    grid = round((tensors[positions].shape[0] - 1) ** 0.5)
    sizes = {
        "vision": {**_tower(tensors, "vision"), "patch_size": patch_size, "image_size": patch_size * grid},
        "projection_dim": tensors["visual_projection.weight"].shape[0],
    }
    tokens = "text_model.embeddings.token_embedding.weight"
    if tokens in tensors:
        length = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
        vocab = {"vocab_size": tensors[tokens].shape[0], "max_position_embeddings": length}
        sizes["text"] = {**_tower(tensors, "text"), **vocab, "eos_token_id": vocab["vocab_size"] - 1}
    return sizes


def _tower(tensors, name):
    prefix = f"{name}_model.encoder.layers."
    fc1 = tensors.get(f"{prefix}0.mlp.fc1.weight")
    if fc1 is None:
        raise WeightsError(f"not a CLIP checkpoint of a known layout; it has no {prefix}0.mlp.fc1.weight")
    depth = len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})
    return {"hidden_size": fc1.shape[1], "intermediate_size": fc1.shape[0], "num_hidden_layers": depth}
