"""Reads and writes files of tensors, as NumPy arrays by name.

Nothing that is read here can run code. A file that is written appears whole or not at all.
"""

import contextlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from imagereward_jax.storage.errors import StorageError, WriteError, way_out, writing
from imagereward_jax.weights.torchscript import RefusedPickle, is_torchscript, read_torchscript

MAX_JSON = 256 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


class _Inert:
    """Stands in for a class that a pickle names beside its tensors; it runs nothing."""


# Classes in files of Stability's own, and in textual-inversion embeddings of its first trainer.
_INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.nn.modules.container.ParameterDict",
)


class WeightsError(StorageError):
    """A file or folder of weights cannot be read; the message names it and says why."""


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a file of tensors, in the format that its extension names.

    Args:
        path: `.safetensors` (mapped into memory: only what is used is read), `.bin`, `.pt`, `.pth` or `.ckpt`
            (PyTorch pickles, tensors only; one enclosing "state_dict" or "model" is removed; also TorchScript
            archives, see `weights.torchscript`), or `.msgpack` (Flax; nested names joined by dots).

    Returns:
        dict of name to NumPy array, each in the dtype of the file (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is empty, truncated, not of the kind that its name says, or a pickle that holds
            anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    readers = {".safetensors": _read_safetensors, ".msgpack": _read_msgpack} | dict.fromkeys(PICKLES, _read_pickle)
    if path.suffix not in readers:
        raise WeightsError(f"{path}: cannot tell its format by its name; expected one of {', '.join(readers)}")
    _refuse_placeholders(path)
    return readers[path.suffix](path)


class StoredTensor:
    """A tensor of a `.safetensors` file. Indexing reads the indexed part from the file.

    Attributes: path, offset (of its first byte in the file), shape, dtype.
    """

    def __init__(self, path: Path, offset: int, shape: Sequence[int], dtype: DTypeLike):
        self.path, self.offset, self.shape, self.dtype = path, offset, tuple(shape), np.dtype(dtype)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def reshape(self, shape: Sequence[int]) -> "StoredTensor":
        """The same tensor in another shape; reads nothing."""
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.path}: a tensor of shape {self.shape} has no shape {tuple(shape)}")
        return StoredTensor(self.path, self.offset, shape, self.dtype)

    def __getitem__(self, index):
        if not self.size:
            return np.empty(self.shape, self.dtype)[index]
        # The map is gone when this returns: pages that were read do not stay in this process's memory.
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.size * self.dtype.itemsize,))
        return np.array(np.asarray(data).view(self.dtype).reshape(self.shape)[index])

    def __array__(self, dtype=None, copy=None):
        return self[...].astype(dtype or self.dtype, copy=False)


def open_tensors(path: str | Path) -> dict[str, Any]:
    """Like `read_tensors`, but returns a `StoredTensor` for each tensor of a `.safetensors` file."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return read_tensors(path)
    _refuse_placeholders(path)
    return _open_safetensors(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the strings in the header of a `.safetensors` file that `read_tensors` has read without error."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return file.metadata() or {}


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a `.safetensors` file that appears whole or not at all.

    Args:
        path: the file; an existing one is replaced at the very end, and left as it was after an error.
        tensors: mapping of name to array.
        metadata: strings for the header; by default `{"format": "pt"}`, which PyTorch libraries ask for.

    Raises:
        WriteError: the file could not be written (a full disk, a missing folder, no permission).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        with writing(path):
            partial.touch()
            mode = partial.stat().st_mode  # by the umask; safetensors makes files that only the owner may read
            save_file(arrays, partial, metadata=metadata or {"format": "pt"})
            partial.chmod(mode)
            os.replace(partial, path)
    except SafetensorError as error:
        raise WriteError(f"{path}: could not be written ({error}); {way_out()}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def cast(tensors: Mapping[str, np.ndarray], dtype: DTypeLike, *, what: str) -> dict[str, np.ndarray]:
    """Casts the floating-point tensors of a dict to `dtype`.

    Args:
        what: how an error names the source of the tensors.

    Raises:
        WeightsError: finite numbers would overflow.
    """
    converted = {}
    for name, array in tensors.items():
        if array.dtype.kind in "biu":
            converted[name] = array
            continue
        with np.errstate(over="ignore"):
            converted[name] = array.astype(dtype, copy=False)
        if converted[name].dtype != array.dtype and np.isinf(converted[name]).sum() != np.isinf(array).sum():
            raise WeightsError(f"{what}: {name} overflows in {np.dtype(dtype).name}; choose bfloat16 or float32")
    return converted


def read_json(path: str | Path, *, infinite: bool = False) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
        infinite: whether numbers may be; JSON has none, but diffusers writes -Infinity into scheduler_config.json.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it does not hold a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > MAX_JSON:
        raise WeightsError(f"{path}: {size:,} bytes are too many for a file of settings (at most {MAX_JSON:,})")
    try:
        constant = _infinity if infinite else _refuse_constant
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _refuse_constant(name):
    raise ValueError(f"it holds {name}, which JSON has not")


def _infinity(name):
    return _refuse_constant(name) if name == "NaN" else float(name)


def _refuse_placeholders(path):
    """Refuses files that commonly stand in for weights: empty, a Git LFS pointer, a web page, an error message."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip().lower()
    if not start:
        raise WeightsError(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: looks like a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path}: looks like a web page, not weights; fetch it again from a direct link")
    if start.startswith(b'{"error'):
        raise WeightsError(f"{path}: holds a server's error message, not weights: {start.decode(errors='replace')}")


def _open_safetensors(path):
    """Opens the tensors of a file by name; the library checks the header and the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
    with open(path, "rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    return {name: _stored_tensor(path, name, entry, 8 + header_size) for name, entry in header.items()}


def _stored_tensor(path, name, entry, start):
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise WeightsError(f"{path}: tensor {name!r} has dtype {entry['dtype']}; those that can be read are {known}")
    offset = start + entry["data_offsets"][0]
    return StoredTensor(path, offset, entry["shape"], _SAFETENSORS_DTYPES[entry["dtype"]])


def _read_safetensors(path):
    """Maps the tensors of a file, copy on write: changing an array in place changes neither the file nor others."""
    stored = _open_safetensors(path)
    data = np.memmap(path, np.uint8, mode="c")
    return {name: _view(tensor, data) for name, tensor in stored.items()}


def _view(tensor, data):
    """A `StoredTensor` as an array over the bytes `data` of its file."""
    part = np.asarray(data[tensor.offset : tensor.offset + tensor.size * tensor.dtype.itemsize])
    return part.view(tensor.dtype).reshape(tensor.shape)


def load_pickle(path: Path) -> Any:
    """Loads what a PyTorch file holds, tensors as PyTorch's, without running anything.

    Raises:
        WeightsError: the file is damaged, or holds objects that opening could run code of.
    """
    _refuse_placeholders(path)
    _refuse_compressed(path)
    import torch

    try:
        # Files of today are mapped into memory: only what is used is read.
        with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {_why_unsafe(error)}") from error
    except Exception as error:  # torch's many decoders raise errors of many kinds for a broken file
        reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise WeightsError(f"{path}: not a whole PyTorch checkpoint ({reason}); fetch it again") from error


def _read_pickle(path):
    """Reads the tensors of a PyTorch file."""
    if is_torchscript(path):
        _refuse_compressed(path)
        return _read_torchscript(path)
    import torch

    loaded = load_pickle(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: expected a dict of tensors, found a {type(loaded).__name__}")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(f"{path}: expected tensors only, but these entries are not: {', '.join(others[:10])}")
    if unnamed := [name for name in loaded if not isinstance(name, str)]:
        raise WeightsError(f"{path}: its tensors should have names; one is called {unnamed[0]!r}")
    return {name: torch_to_numpy(path, name, tensor) for name, tensor in loaded.items()}


def _refuse_compressed(path):
    """Refuses an archive that unpacks to far more than it is: PyTorch's are not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # no archive, or a broken one: its reader says so
    if unpacked > 2 * path.stat().st_size + 2**24:
        raise WeightsError(
            f"{path}: refused: {path.stat().st_size / 2**20:,.1f} MiB that unpack to {unpacked / 2**20:,.0f}, and "
            "checkpoints are not compressed"
        )


def _read_torchscript(path):
    """Reads the tensors of an archive of `torch.jit.save`; `weights_only=True` refuses that format."""
    try:
        return read_torchscript(path)
    except RefusedPickle as error:
        raise WeightsError(
            f"{path}: refused: this TorchScript archive holds Python objects other than tensors ({error})"
        ) from error
    except Exception as error:  # a damaged zip or pickle raises one of a dozen kinds
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise WeightsError(f"{path}: not a whole TorchScript archive ({reason}); fetch it again") from error


def _why_unsafe(error):
    """Explains in one line why PyTorch's safe loader refused a pickle."""
    text = str(error)
    detail = next((line.strip() for line in text.split("\n") if "Unsupported" in line or "GLOBAL" in line), "")
    if not detail:
        return "not a PyTorch checkpoint, or one that is damaged; fetch it again"
    detail = (
        detail.split("WeightsUnpickler error:")[-1].split(" by default")[0].split(" was not an allowed")[0].strip(" .")
    )
    return (
        f"refused: it holds Python objects other than tensors ({detail}), and opening such a file can run any code. "
        "Get the weights as .safetensors"
    )


def torch_to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    """Converts a PyTorch tensor of plain numbers, which may share its memory; WeightsError names path and tensor."""
    import torch

    kind = "quantised" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout).split(".")[1]
    if kind != "strided":
        raise WeightsError(f"{path}: {name} is a {kind} tensor, not one of plain numbers; save it as such")
    bytes_, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if bytes_ > max(4 * stored, 2**24):
        raise WeightsError(f"{path}: refused: {name} unpacks {stored:,} bytes to {bytes_ / 2**20:,.0f} MiB")
    tensor = tensor.detach().contiguous()
    others = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    if tensor.dtype in others:
        bits, dtype = others[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    if tensor.dtype.is_complex or "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
        raise WeightsError(f"{path}: {name} has dtype {tensor.dtype}, which is not read; save it as float32")
    return tensor.numpy()


def _read_msgpack(path):
    """Reads a Flax checkpoint: a nested dict of arrays, whose names are joined by dots."""
    from flax.serialization import msgpack_restore

    try:
        nested = msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack and NumPy raise errors of many kinds for a broken file
        raise WeightsError(f"{path}: not a whole Flax msgpack file ({error or type(error).__name__})") from error
    tensors = dict(_flatten(nested, ())) if isinstance(nested, dict) else {}
    others = [name for name, value in tensors.items() if not isinstance(value, np.ndarray)]
    if others or not tensors:
        found = f"these entries: {', '.join(others[:10])}" if others else f"a {type(nested).__name__}"
        raise WeightsError(f"{path}: expected a nested dict of arrays, found {found}")
    return tensors


def _flatten(node, path):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*path, str(name)))
        else:
            yield ".".join((*path, str(name))), value
