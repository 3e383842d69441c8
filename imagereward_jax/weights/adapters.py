"""Adapter files (LoRA, LyCORIS): read in the layouts that people have, written in the one that diffusers loads, merged.

An adapter is {network: {layer: LowRank or Factors}}, its arrays laid out as in PyTorch.
"""

import os
import re
from collections import defaultdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from imagereward_jax.models.lora import LoRAParam
from imagereward_jax.weights import files, hub, mapping
from imagereward_jax.weights import generation as generation_file
from imagereward_jax.weights.adapter_names import layer_aliases, parse_key, unread_format
from imagereward_jax.weights.adapter_settings import read_settings
from imagereward_jax.weights.adapter_updates import Factors, LowRank, change, lycoris_rank
from imagereward_jax.weights.files import WeightsError

FILE = "pytorch_lora_weights.safetensors"


def read_adapter(name_or_path, networks):
    """Reads an adapter for a model, in any of the layouts of `adapter_names` and formats of `adapter_updates`.

    Args:
        name_or_path: see `hub.find_file`. networks: the model's, by name (`pipeline.networks`).

    Returns:
        {network: {layer: LowRank or Factors}} of the networks that the file adapts.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: naming keys that fit no layer, parts that are absent, shapes that are wrong, settings that are
            malformed or not implemented.
    """
    path = hub.find_file(name_or_path, FILE, "adapter")
    tensors = files.read_tensors(path)
    aliases = layer_aliases(networks)
    layers = _gather(path, tensors, aliases)
    targets = [(name, target) for name in sorted(layers) for target in aliases[name]]
    layouts = {target.network: None for _, target in targets}
    layouts = {network: mapping.torch_layout(networks[network]) for network in layouts}
    settings = read_settings(path, tensors, layouts)
    adapter = defaultdict(dict)
    for name, target in targets:
        kernel = layouts[target.network][f"{target.layer}.weight"].torch_shape
        update = _read_update(path, target, layers[name], kernel, settings.get(target.network))
        adapter[target.network][target.layer] = update
    _repair_split(adapter, targets, layers)
    return {network: dict(sorted(updates.items())) for network, updates in sorted(adapter.items())}


def _gather(path, tensors, aliases):
    """{the file's name of a layer: {role of a tensor: array}} of a file."""
    layers, unknown = defaultdict(dict), []
    for key, array in tensors.items():
        parsed = parse_key(key)
        if parsed is None or parsed[0] not in aliases:
            unknown.append(key)
        else:
            layers[parsed[0]][parsed[1]] = array
    if unknown:
        shown = ", ".join(sorted(unknown)[:3]) + (", ..." if len(unknown) > 3 else "")
        why = unread_format(unknown)
        raise WeightsError(f"{path}: {len(unknown)} of {len(tensors)} keys fit no layer of this model ({why}): {shown}")
    if not layers:
        raise WeightsError(f"{path}: holds no adapter")
    for name, parts in layers.items():
        for role, array in parts.items():
            whole = role == "alpha" and jnp.issubdtype(array.dtype, jnp.integer)  # as kohya writes alpha=16
            if not (whole or (jnp.issubdtype(array.dtype, jnp.floating) and np.isfinite(array).all())):
                raise WeightsError(f"{path}: layer {name} has values that are not finite numbers")
    return layers


def _read_update(path, target, tensors, kernel, settings):
    """The update of one layer of the model with weights of the shape `kernel`, from a layer of the file."""
    layer, origin = f"{target.network}.{target.layer}", target.origin
    stored = (kernel[0] * (1 if origin is None or origin.third is None else 3), *kernel[1:])
    magnitude = _magnitude(path, layer, tensors, origin, stored)
    if settings and settings.values.get("use_dora") and magnitude is None:
        raise WeightsError(f"{settings.where}: use_dora=True, but layer {layer} has no lora_magnitude_vector")
    factors = {role: array for role, array in tensors.items() if role.startswith(("hada_", "lokr_", "diff"))}
    alpha = tensors.get("alpha")
    if factors:
        kind = {"h": "LoHa", "l": "LoKr", "d": "full difference"}[next(iter(factors))[0]]
        rank = lycoris_rank(factors)
        scale = 1.0 if rank is None else _scale(path, layer, target, settings, rank, alpha)
        update = Factors(kind, factors, scale, stored, origin, magnitude)
        _check_product(path, layer, update)
        return update
    absent = [half for half in ("down", "up") if half not in tensors]
    if absent:
        raise WeightsError(f"{path}: layer {layer} has no {absent[0]} weight (lora_A is down, lora_B up)")
    down, up, core = tensors["down"], tensors["up"], tensors.get("core")
    shape = stored if core is None else (*stored[:2], *[1] * (len(stored) - 2))
    down, up = (_with_axes(array, len(kernel)) for array in (down, up))
    _check_shapes(path, layer, down, up, shape)
    if core is not None and tuple(core.shape) != (down.shape[0], down.shape[0], *stored[2:]):
        raise WeightsError(f"{path}: layer {layer} has a middle weight (lora_mid) of {list(core.shape)}")
    scale = _scale(path, layer, target, settings, down.shape[0], alpha)
    return LowRank(down, up if origin is None else origin.rows(up), scale, core, magnitude)


def _with_axes(array, ndim):
    """A factor as the layer has its weight: a matrix, or a 1x1 convolution."""
    if ndim == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
        return array.reshape(array.shape[:2])
    return array.reshape(*array.shape, 1, 1) if ndim == 4 and array.ndim == 2 else array


def _magnitude(path, layer, tensors, origin, stored):
    """DoRA's lengths of the layer: [out], or [1, in, ...] of columns; None if it is no DoRA."""
    vector = tensors.get("magnitude.rows", tensors.get("magnitude"))
    if vector is None:
        return None
    by_row = "magnitude.rows" in tensors or vector.ndim == 1 or vector.shape[0] == stored[0] != 1
    if vector.size != stored[0 if by_row else 1]:
        raise WeightsError(f"{path}: layer {layer}: DoRA's lengths are {list(vector.shape)}, its weight {list(stored)}")
    if by_row:
        return vector.reshape(-1) if origin is None else origin.rows(vector.reshape(-1))
    if origin is not None and origin.third is not None:
        raise WeightsError(f"{path}: layer {layer}: DoRA over the columns of query, key and value is not implemented")
    return vector


def _check_product(path, layer, update):
    try:
        update.delta()
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: layer {layer}: not a whole {update.kind} of this layer ({error})") from error


def _check_shapes(path, layer, down, up, kernel):
    ranks = {down.shape[0] if down.ndim > 1 else 0, up.shape[1] if up.ndim > 1 else 0}
    if len(ranks) > 1 or 0 in ranks:
        raise WeightsError(
            f"{path}: layer {layer} has a down weight of {list(down.shape)} and an up weight of {list(up.shape)}; the "
            "first axis of one and the second of the other should be the rank"
        )
    if tuple(down.shape[1:]) == kernel[1:] and up.shape[0] == kernel[0] and up.size == kernel[0] * down.shape[0]:
        return
    context = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    made_for = context.get(down.shape[1]) if re.search(r"attn2\.to_[kv]$", layer) and down.ndim == 2 else None
    why = f" (it seems to be made for {made_for})" if made_for else " (made for another model or family?)"
    raise WeightsError(
        f"{path}: layer {layer} is adapted from {list(down.shape[1:])} to {up.shape[0]} features, but has "
        f"{list(kernel[1:])} and {kernel[0]} in this model{why}"
    )


def _scale(path, layer, target, settings, rank, alpha):
    """The factor of a layer's update: alpha is beside the weights (kohya), in PEFT's settings, or else the rank."""
    if alpha is None:
        return settings.scale(target.layer, rank) if settings else 1.0
    if alpha.size != 1:
        raise WeightsError(f"{path}: layer {layer} has an alpha of {list(alpha.shape)}, should be one number")
    return float(alpha.item()) / rank


def _repair_split(adapter, targets, layers):
    """Gives files of kohya's `split_qkv` their strength.

    It trains query, key and value apart with rank r, and saves them as one layer of rank 3r, block by block, with the
    alpha of rank r: as written, its strength would be a third. Such a layer is told by its blocks, and by the file's
    other layers, which have its alpha at a third of its rank.
    """
    single = {
        (low_rank.rank, float(layers[name]["alpha"]))
        for name, target in targets
        if (target.origin is None or target.origin.third is None) and "alpha" in layers[name]
        and isinstance(low_rank := adapter[target.network][target.layer], LowRank)
    }  # fmt: skip
    for name, target in targets:
        third = target.origin.third if target.origin else None
        update = adapter[target.network][target.layer]
        if third is None or not isinstance(update, LowRank) or "alpha" not in layers[name] or update.rank % 3:
            continue
        rank = update.rank // 3
        own = slice(third * rank, (third + 1) * rank)
        apart = not np.delete(np.asarray(update.up), np.arange(update.rank)[own], axis=1).any()
        if apart and (rank, float(layers[name]["alpha"])) in single:
            parts = {"down": update.down[own], "up": update.up[:, own], "scale": update.scale * 3}
            adapter[target.network][target.layer] = update._replace(**parts)


def merge(networks, params, adapter, weight=1.0):
    """Weights of a model with `weight` times an adapter added; `params` stays as it was.

    Args:
        networks, params: by name, of the whole model; params float32, of which the adapted ones are copied.
        adapter: from `read_adapter`. weight: 0 leaves the model as it is, 1 is the adapter as trained.
    """
    merged = dict(params)
    for network, layers in adapter.items():
        layout, by_path = mapping.torch_layout(networks[network]), defaultdict(list)
        for name, update in layers.items():
            leaf = layout[f"{name}.weight"]
            by_path[leaf.path].append((leaf, update))
        for path, updates in by_path.items():
            merged = _replace(merged, (network, *path), lambda kernel, updates=updates: _add(kernel, updates, weight))
    return merged


def _add(kernel, updates, weight):
    """A copy of a kernel, or of a stack of them, with `weight` times each of `updates` [(leaf, update)] added."""
    kernel = np.array(kernel)
    for leaf, update in updates:
        layer, axes = kernel if leaf.index is None else kernel[leaf.index], leaf.to_torch
        layer += np.float32(weight) * change(update, layer.transpose(axes)).transpose(np.argsort(axes))
    return kernel


def _replace(tree, path, function):
    """`tree` with `function` of the leaf at `path`; what is on the way there is copied."""
    head, *rest = path
    return {**tree, head: _replace(tree[head], rest, function) if rest else function(tree[head])}


def low_rank_params(network, layers, *, rank, alpha, what):
    """Parameters of an adapted network that continue from an adapter, nested, float32.

    The update is the adapter's, whatever the network's alpha: another scale than the adapter's is made up for in B.

    Args:
        network: with the slots filled (`models.lora.attach`). layers: {layer: LowRank}. rank, alpha: of the network.
        what: how an error names the adapter.

    Raises:
        WeightsError, mapping.CheckpointMismatch: it has other layers or another rank.
    """
    tensors = {}
    for name, low_rank in layers.items():
        if not isinstance(low_rank, LowRank) or low_rank.core is not None or low_rank.magnitude is not None:
            raise WeightsError(
                f"{what}: layer {name} is a {low_rank.kind} that training cannot continue from, only plain LoRA; merge "
                "it into the model (convert/merge_lora.py), and train from that"
            )
        if low_rank.rank != rank:
            raise WeightsError(
                f"{what}: layer {name} has rank {low_rank.rank}, but config.lora has rank={rank}: to continue from it "
                "set the adapter's rank"
            )
        up = np.asarray(low_rank.up, np.float32) * np.float32(low_rank.scale * rank / alpha)
        tensors |= {f"{name}.lora_A.weight": low_rank.down, f"{name}.lora_B.weight": up}
    return mapping.from_torch(network, tensors, what=what, dtype=np.float32, kind=LoRAParam)


def read_generation(name_or_path):
    """The `Generation` beside an adapter's file, here or on the hub; None if there is none."""
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if hub.is_repository(name):
        path = hub.resolve_model(name, allow_patterns=[FILE, generation_file.FILE])
    return generation_file.read_generation(path if path.is_dir() else path.parent) if path.exists() else None


def write_adapter(folder, networks, params, *, rank, alpha, dtype=np.float32, generation=None):
    """Writes `folder`/pytorch_lora_weights.safetensors, which diffusers' `load_lora_weights(folder)` loads.

    B is multiplied by alpha / rank. Without an alpha every reader takes it to be the rank, also those that know nothing
    of the header in which newer ones of diffusers keep another (diffusers 0.27, ComfyUI, web UIs).

    Args:
        networks: adapted networks by name. params: their low-rank parameters, by the same names.
        rank, alpha: of all layers. dtype: of the tensors in the file.
        generation: a `Generation` to state beside it, or None.

    Raises:
        WriteError: it could not be written. WeightsError: it overflows in `dtype`.
    """
    tensors, scale = {}, np.float32(alpha / rank)
    for name, tree in params.items():
        for key, array in mapping.to_torch(networks[name], tree, kind=LoRAParam).items():
            tensors[f"{name}.{key}"] = array * scale if key.endswith(".lora_B.weight") else array
    files.write_safetensors(Path(folder) / FILE, files.cast(tensors, dtype, what=str(folder)))
    if generation is not None:
        generation_file.write_generation(folder, generation)
