"""Converts PyTorch tensors to Flax parameters and back: the one mapping that every network uses.

A network's parameters are a nested dict (`nnx.to_pure_dict` of its state). Attributes are named as in the PyTorch
checkpoint, so the path to a layer is its key there. The layer's class states the rest in `torch_names`.
"""

import functools
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import scanned_layers


class CheckpointMismatch(ValueError):
    """A checkpoint's keys or shapes are not those of the network; the message lists all that differ."""


class Leaf(NamedTuple):
    """One parameter: its path in the network, its shape there, and the order of axes that gives PyTorch's layout.

    index: number of the layer, if the parameter at `path` is that of a stack of layers (`models.scanned_layers`); shape
    and to_torch are then without the axis of the layers.
    """

    path: tuple
    shape: tuple[int, ...]
    to_torch: tuple[int, ...] | None
    index: int | None

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return self.shape if self.to_torch is None else tuple(self.shape[axis] for axis in self.to_torch)


def abstract(build: Callable[[], nnx.Module]) -> nnx.Module:
    """Makes the network of `build()` with shapes instead of arrays, which takes no memory and next to no time."""
    return nnx.eval_shape(build)


def params_of(module: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Any]:
    """The parameters of a network as a nested dict of arrays (or shapes, for an abstract one); see `torch_layout`."""
    return nnx.to_pure_dict(nnx.state(module, kind))


def torch_layout(module: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> dict[str, Leaf]:
    """Maps each PyTorch key to the `Leaf` of `module` (abstract or not) that holds it.

    Args:
        kind: the type of variables: `nnx.Param` for the network's own weights, `models.lora.LoRAParam` for an adapter.
    """
    modules = {path: node for path, node in nnx.iter_modules(module)}
    stacks = scanned_layers.stacks_of(module)
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


def from_torch(
    module: nnx.Module,
    tensors: Mapping[str, Any],
    *,
    what: str = "checkpoint",
    ignore: Collection[str] = (),
    dtype: DTypeLike | None = None,
    target: dict[str, Any] | None = None,
    kind: type[nnx.Variable] = nnx.Param,
) -> dict[str, Any]:
    """Converts PyTorch tensors to parameters of `module`, one at a time: memory holds the result and one tensor.

    Args:
        module: the network, abstract or not; only its structure is used.
        tensors: mapping of PyTorch key to an array with PyTorch's shape, or to a `files.StoredTensor`, of which only
            the part that is needed is read.
        what: how an error names the source (a file, a folder).
        ignore: regular expressions; matching keys of `tensors` are left out.
        dtype: converts floating-point tensors; None keeps each as it is.
        target: nested dict of `jax.ShapeDtypeStruct`, as `params_of` gives for an abstract network. Each parameter gets
            the dtype of its leaf. A leaf with a sharding becomes a jax array, of which each device reads its own part.
            Replaces `dtype`.
        kind: as for `torch_layout`.

    Returns:
        The nested dict that `nnx.merge` takes: NumPy arrays, or jax arrays for leaves of `target` with a sharding.

    Raises:
        CheckpointMismatch: naming every missing, unexpected and misshapen key; or one whose values are not finite.
    """
    layout = torch_layout(module, kind)
    _check_keys(layout, tensors, what, ignore)
    params = {}
    for path, leaves in _by_path(layout).items():
        struct = None if target is None else functools.reduce(operator.getitem, path, target)
        sources = [(leaf, tensors[key]) for key, leaf in leaves]
        value = _parameter(sources, dtype if struct is None else struct.dtype, struct)
        if not _is_finite(value):
            raise CheckpointMismatch(f"{what}: {leaves[0][0]} has values that are NaN or infinite; the file is broken")
        _put(params, path, value)
    return params


def _is_finite(array):
    """Whether the parts of an array that are here hold neither NaN nor infinity."""
    if isinstance(array, jax.Array):
        return all(_is_finite(np.asarray(shard.data)) for shard in array.addressable_shards if shard.replica_id == 0)
    return not jnp.issubdtype(array.dtype, jnp.floating) or bool(np.isfinite(array).all())


def _check_keys(layout, tensors, what, ignore):
    """Raises `CheckpointMismatch` unless `tensors` has exactly the keys and shapes of `layout`."""
    present = {key for key in tensors if not any(re.search(pattern, key) for pattern in ignore)}
    missing = sorted(layout.keys() - present)
    unexpected = sorted(present - layout.keys())
    misshapen = [
        f"{key}: {tuple(tensors[key].shape)} in the checkpoint, {leaf.torch_shape} in the network"
        for key, leaf in sorted(layout.items())
        if key in present and tuple(tensors[key].shape) != leaf.torch_shape
    ]
    misshapen += [
        f"{key}: {tensors[key].dtype} in the checkpoint, floating point in the network"
        for key in sorted(layout.keys() & present)
        if not jnp.issubdtype(tensors[key].dtype, jnp.floating)
    ]
    if missing or unexpected or misshapen:
        raise CheckpointMismatch(_describe(what, missing, unexpected, misshapen))


def _by_path(layout):
    """Groups a layout by parameter: {path: [(key, leaf), ...]}, the layers of a stack in order."""
    paths = defaultdict(list)
    for key, leaf in layout.items():
        paths[leaf.path].append((key, leaf))
    return paths


def _parameter(sources, dtype, struct):
    """Makes one parameter from its tensor, or from those of a stack's layers: [(leaf, tensor), ...]."""
    first = sources[0][0]
    shape = first.shape if first.index is None else (len(sources), *first.shape)
    if struct is None or struct.sharding is None:
        return _read(sources, tuple(slice(0, size) for size in shape), dtype)
    parts = {}

    def part(index):
        """Reads the part at `index`; devices that hold the same part share one array."""
        index = tuple(slice(*axis.indices(size)) for axis, size in zip(index, shape))
        where = tuple((axis.start, axis.stop) for axis in index)
        if where not in parts:
            parts[where] = _read(sources, index, dtype)
        return parts[where]

    return jax.make_array_from_callback(shape, struct.sharding, part)


def _read(sources, index, dtype):
    """Reads the part of a parameter at `index` (slices along its axes), contiguous and converted."""
    if sources[0][0].index is None:
        return _read_tensor(*sources[0], index, dtype)
    layers, rest = range(len(sources))[index[0]], index[1:]
    if dtype is None:
        return np.stack([_read_tensor(*sources[layer], rest, None) for layer in layers])
    out = np.empty((len(layers), *(axis.stop - axis.start for axis in rest)), dtype)
    for row, layer in enumerate(layers):
        out[row] = _read_tensor(*sources[layer], rest, None)
    return out


def _read_tensor(leaf, tensor, index, dtype):
    if leaf.to_torch is None:
        array = np.asarray(tensor[index])
    else:
        array = np.asarray(tensor[tuple(index[axis] for axis in leaf.to_torch)]).transpose(np.argsort(leaf.to_torch))
    if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating):  # bfloat16 and fp8 among them
        array = array.astype(dtype, copy=False)
    return np.ascontiguousarray(array).reshape(array.shape)


def _put(tree, path, value):
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def to_torch(module: nnx.Module, params: dict[str, Any], kind: type[nnx.Variable] = nnx.Param) -> dict[str, np.ndarray]:
    """Converts the parameters of `module` to PyTorch tensors (NumPy arrays by key); the inverse of `from_torch`.

    Parameters come to the host one after the other. If other processes hold parts of one, every process has to call
    this, and every process gets all tensors.
    """
    tensors = {}
    for path, leaves in _by_path(torch_layout(module, kind)).items():
        whole = host_array(functools.reduce(operator.getitem, path, params))
        for key, leaf in leaves:
            array = whole if leaf.index is None else whole[leaf.index]
            tensors[key] = array if leaf.to_torch is None else np.ascontiguousarray(array.transpose(leaf.to_torch))
    return tensors


def host_array(array: Any) -> np.ndarray:
    """Copies an array to the host; all-gathers it if other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _describe(what, missing, unexpected, misshapen):
    lines = [f"{what} does not fit the network:"]
    for title, keys in (("missing", missing), ("unexpected", unexpected), ("of another kind", misshapen)):
        if keys:
            lines.append(f"  {len(keys)} {title}:")
            lines += [f"    {key}" for key in keys]
    return "\n".join(lines)
