"""How a PyTorch tensor becomes a Flax parameter and back: the one mapping that every network uses.

A network's parameters are a nested dict (`nnx.to_pure_dict` of its state). Because attributes are named as in
the PyTorch checkpoint, the path to a layer is its key there; the layer's class says the rest in `torch_names`.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from imagereward_jax.models import scanned_layers


class CheckpointMismatch(ValueError):
    """A checkpoint's keys or shapes are not those of the network; the message lists all that differ."""


class Leaf(NamedTuple):
    """One parameter: its path in the network, its shape there, and the axes order that makes it PyTorch's.

    index: which layer's, where the parameter at `path` is that of a stack of layers (`models.stack`); shape and
    to_torch are without the axis of the layers.
    """

    path: tuple
    shape: tuple
    to_torch: tuple | None
    index: int | None

    @property
    def torch_shape(self):
        return self.shape if self.to_torch is None else tuple(self.shape[axis] for axis in self.to_torch)


def abstract(build):
    """The network that `build()` would make, with shapes instead of arrays: no memory, no time."""
    return nnx.eval_shape(build)


def params_of(module, kind=nnx.Param):
    """The parameters of a network as a nested dict of arrays (or shapes, for an abstract one); see `torch_layout`."""
    return nnx.to_pure_dict(nnx.state(module, kind))


def torch_layout(module, kind=nnx.Param):
    """Maps each PyTorch key to the `Leaf` of `module` (abstract or not) that holds it.

    Args:
        kind: the type of variables: `nnx.Param` for the network's own weights, `models.lora.LoRAParam` for an adapter.
    """
    modules = {path: node for path, node in nnx.iter_modules(module)}
    stacks = scanned_layers.depths(module)
    layout = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
        *parents, name = path
        torch_names = getattr(modules[tuple(parents)], "torch_names", {})
        torch_name, axes = torch_names.get(name, (name, None))
        to_torch = None if axes is None else tuple(axes)
        for key, index in scanned_layers.numbered(parents, stacks):
            shape = tuple(variable.shape if index is None else variable.shape[1:])
            layout[".".join(map(str, [*key, torch_name]))] = Leaf(path, shape, to_torch, index)
    return layout


def from_torch(module, tensors, *, what="checkpoint", ignore=(), dtype=None, kind=nnx.Param):
    """Parameters for `module` from PyTorch tensors.

    Args:
        module: the network, abstract or not; only its structure is used.
        tensors: mapping of PyTorch key to array, with PyTorch's shapes.
        what: how an error names the source (a file, a folder).
        ignore: regular expressions; matching keys of `tensors` are left out.
        dtype: converts floating-point tensors; None keeps each as it is.
        kind: as for `torch_layout`.

    Returns:
        The nested dict of numpy arrays that `nnx.merge` takes.

    Raises:
        CheckpointMismatch: naming every missing, unexpected and misshapen key.
    """
    layout = torch_layout(module, kind)
    present = {key for key in tensors if not any(re.search(pattern, key) for pattern in ignore)}
    missing = sorted(layout.keys() - present)
    unexpected = sorted(present - layout.keys())
    misshapen = [
        f"{key}: {tuple(tensors[key].shape)} in the checkpoint, {leaf.torch_shape} in the network"
        for key, leaf in sorted(layout.items())
        if key in present and tuple(tensors[key].shape) != leaf.torch_shape
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(_describe(what, missing, unexpected, misshapen))
    params, layers = {}, defaultdict(list)
    for key, leaf in layout.items():
        array = np.asarray(tensors[key])
        if dtype is not None and (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            array = array.astype(dtype)
        if leaf.to_torch is not None:
            array = array.transpose(np.argsort(leaf.to_torch))
        if leaf.index is None:
            _put(params, leaf.path, np.ascontiguousarray(array))
        else:
            layers[leaf.path].append(array)  # the layout counts the layers up
    for path in list(layers):
        _put(params, path, np.stack(layers.pop(path)))
    return params


def _put(tree, path, value):
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def to_torch(module, params, kind=nnx.Param):
    """PyTorch tensors (numpy arrays by key) from the parameters of `module`; the inverse of `from_torch`."""
    tensors = {}
    for key, leaf in torch_layout(module, kind).items():
        node = params
        for part in leaf.path:
            node = node[part]
        array = np.asarray(jax.device_get(node if leaf.index is None else node[leaf.index]))
        tensors[key] = array if leaf.to_torch is None else np.ascontiguousarray(array.transpose(leaf.to_torch))
    return tensors


def _describe(what, missing, unexpected, misshapen):
    lines = [f"{what} does not fit the network:"]
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if keys:
            lines.append(f"  {len(keys)} {title}:")
            lines += [f"    {key}" for key in keys]
    return "\n".join(lines)
