"""Reads the tensors of a TorchScript archive, such as OpenAI's CLIP files, without PyTorch and without running it.

Such a file is a zip of a program and of a pickle that rebuilds the module's attributes. PyTorch opens it by
`torch.jit.load`, which compiles and can run the archive's program, or by unsafe unpickling; its safe loader
(`weights_only=True`) refuses the format. Here the pickle may name nothing but tensors, containers and TorchScript
classes, which become plain dictionaries. The program is never read.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class RefusedPickle(ValueError):
    """The archive's pickle names something other than tensors, containers and TorchScript classes."""


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, and not the zip that `torch.save` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every tensor of the module and its submodules, by dotted name.

    Raises:
        RefusedPickle: the archive holds other Python objects.
        ValueError, KeyError, OSError, zipfile.BadZipFile, pickle.UnpicklingError: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("no data.pkl in the archive")
        root = names[0].removesuffix("data.pkl")
        module = _Unpickler(archive, root).load()
    return dict(_tensors(module, ()))


class _Module(dict):
    """The attributes by name of a TorchScript object."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise RefusedPickle(f"a TorchScript object with the state {type(state).__name__}")
        self.update(state)


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors and TorchScript's containers; refuses all other names."""

    def __init__(self, archive, root):
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        if module == "torch.jit._pickle" and name in ("build_tensorlist", "restore_type_tag"):
            return _first
        raise RefusedPickle(f"{module}.{name}")

    def persistent_load(self, identity):
        """Reads the numbers of a storage: ("storage", dtype, file, device, length)."""
        kind, storage, key, _, _ = identity
        if kind != "storage" or storage not in _STORAGES:
            raise RefusedPickle(f"an object of kind {kind!r}")
        if key not in self.storages:
            self.storages[key] = np.frombuffer(self.archive.read(f"{self.root}data/{key}"), _STORAGES[storage])
        return self.storages[key]


def _first(value, *_):
    return value


def _rebuild_tensor(storage, offset, shape, strides, *_):
    """Copies the tensor that lies in `storage` (1-D) with the given offset and strides, in elements."""
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (math.prod(shape) and last >= len(storage)):
        raise ValueError("a tensor lies outside of its storage")
    if math.prod(shape) > max(4 * len(storage), 2**24):
        raise ValueError(f"a tensor of {math.prod(shape):,} numbers of which {len(storage):,} are in the file")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


def _tensors(module, path):
    for name, value in module.items():
        if isinstance(value, _Module):
            yield from _tensors(value, (*path, name))
        elif isinstance(value, np.ndarray):
            yield ".".join((*path, name)), value
