"""Adapter files (LoRA): read in the layouts that people have, written in the one that diffusers loads, merged.

An adapter is {network: {layer: LowRank}}, its arrays laid out as in PyTorch.
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from imagereward_jax.models.lora import LoRAParam
from imagereward_jax.weights import files, hub, mapping
from imagereward_jax.weights import generation as generation_file
from imagereward_jax.weights.adapter_names import layer_aliases, parse_key
from imagereward_jax.weights.adapter_settings import read_settings
from imagereward_jax.weights.files import WeightsError

FILE = "pytorch_lora_weights.safetensors"


class LowRank(NamedTuple):
    """The update of one layer: `scale * up @ down`. down: [rank, in, ...]; up: [out, rank, ...]."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self):
        return self.down.shape[0]

    def delta(self):
        """The update of the layer's PyTorch weight, float32 [out, in, ...]."""
        down, up = (np.asarray(array, np.float32) for array in (self.down, self.up))
        product = up.reshape(up.shape[0], self.rank) @ down.reshape(self.rank, -1)
        return np.float32(self.scale) * product.reshape(up.shape[0], *down.shape[1:])


def find_adapter(name_or_path):
    """The file of an adapter: a file, a folder that holds `FILE` or one file of safetensors, or a name on the hub.

    Raises:
        FileNotFoundError: there is none; the message says what was looked for.
    """
    path = Path(os.path.expanduser(str(name_or_path)))
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if (path / FILE).is_file():
            return path / FILE
        if len(found) == 1:
            return found[0]
        names = ", ".join(each.name for each in found) or "no .safetensors file"
        raise FileNotFoundError(f"{path}: expected {FILE}, found {names}; pass the path of the file")
    name = str(name_or_path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", name) and not path.suffix and not hub.looks_like_path(name):
        return hub.resolve_file(name, FILE)
    raise FileNotFoundError(f"{name}: no such adapter; expected a .safetensors file, or a folder with {FILE}")


def read_adapter(name_or_path, networks):
    """Reads an adapter for a model.

    Args:
        name_or_path: see `find_adapter`. networks: the model's, by name (`pipeline.networks`).

    Returns:
        {network: {layer: LowRank}} of the networks that the file adapts.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: naming keys that fit no layer, halves that are absent, shapes that are wrong, settings that are
            malformed or not implemented.
    """
    path = find_adapter(name_or_path)
    tensors = files.read_tensors(path)
    parts = _gather(path, tensors, layer_aliases(networks))
    layouts = {network: mapping.torch_layout(networks[network]) for network in {name for name, _ in parts}}
    settings = read_settings(path, tensors, layouts)
    adapter = defaultdict(dict)
    for (network, name), tensors in sorted(parts.items()):
        absent = [half for half in ("down", "up") if half not in tensors]
        if absent:
            raise WeightsError(f"{path}: layer {network}.{name} has no {absent[0]} weight (lora_A is down, lora_B up)")
        down, up = tensors["down"], tensors["up"]
        for half in (down, up):
            if not jnp.issubdtype(half.dtype, jnp.floating) or not np.isfinite(half).all():
                raise WeightsError(f"{path}: layer {network}.{name} has values that are not finite numbers")
        _check_shapes(path, f"{network}.{name}", down, up, layouts[network][f"{name}.weight"].torch_shape)
        scale = _scale(path, (network, name), settings.get(network), down.shape[0], tensors.get("alpha"))
        adapter[network][name] = LowRank(down, up, scale)
    return dict(adapter)


def _gather(path, tensors, aliases):
    """{(network, layer): {"down", "up" and perhaps "alpha": array}} of a file."""
    parts, unknown = defaultdict(dict), []
    for key, array in tensors.items():
        parsed = parse_key(key)
        layer = aliases.get(parsed[0]) if parsed else None
        if layer is None:
            unknown.append(key)
        else:
            parts[layer][parsed[1]] = array
    if unknown:
        kinds = {"dora_scale": "DoRA", "lora_magnitude": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
        kind = next((kinds[mark] for mark in kinds if any(mark in key for key in unknown)), None)
        why = f"a {kind} adapter, which is not implemented" if kind else "made for another model or family?"
        shown = ", ".join(sorted(unknown)[:3]) + (", ..." if len(unknown) > 3 else "")
        raise WeightsError(f"{path}: {len(unknown)} of {len(tensors)} keys fit no layer of this model ({why}): {shown}")
    if not parts:
        raise WeightsError(f"{path}: holds no adapter")
    return parts


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


def _scale(path, layer, settings, rank, alpha):
    """The factor of a layer's update: alpha is beside the weights (kohya), in PEFT's settings, or else the rank."""
    if alpha is None:
        return settings.scale(layer[1], rank) if settings else 1.0
    if alpha.size != 1:
        raise WeightsError(f"{path}: layer {'.'.join(layer)} has an alpha of {list(alpha.shape)}, should be one number")
    return float(alpha.item()) / rank


def merge(networks, params, adapter, weight=1.0):
    """Weights of a model with `weight` times an adapter added; `params` stays as it was.

    Args:
        networks, params: by name, of the whole model; params float32, of which the adapted ones are copied.
        adapter: from `read_adapter`. weight: 0 leaves the model as it is, 1 is the adapter as trained.
    """
    merged = dict(params)
    for network, layers in adapter.items():
        layout, by_path = mapping.torch_layout(networks[network]), defaultdict(list)
        for name, low_rank in layers.items():
            leaf = layout[f"{name}.weight"]
            by_path[leaf.path].append((leaf, low_rank))
        for path, updates in by_path.items():
            merged = _replace(merged, (network, *path), lambda kernel, updates=updates: _add(kernel, updates, weight))
    return merged


def _add(kernel, updates, weight):
    """A copy of a kernel, or of a stack of them, with `weight` times each of `updates` [(leaf, LowRank)] added."""
    kernel = np.array(kernel)
    for leaf, low_rank in updates:
        layer = kernel if leaf.index is None else kernel[leaf.index]
        layer += np.float32(weight) * low_rank.delta().transpose(np.argsort(leaf.to_torch))
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
        if low_rank.rank != rank:
            raise WeightsError(
                f"{what}: layer {name} has rank {low_rank.rank}, but config.lora has rank={rank}: to continue from it "
                "set the adapter's rank"
            )
        up = np.asarray(low_rank.up, np.float32) * np.float32(low_rank.scale * rank / alpha)
        tensors |= {f"{name}.lora_A.weight": low_rank.down, f"{name}.lora_B.weight": up}
    return mapping.from_torch(network, tensors, what=what, dtype=np.float32, kind=LoRAParam)


def read_generation(name_or_path):
    """The `Generation` beside an adapter's file; None if there is none (on the hub, none is looked for)."""
    path = Path(os.path.expanduser(str(name_or_path)))
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
