"""The files that a pipeline was opened from; weights are read when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagereward_jax.weights import diffusers, files, mapping, orbax, single_file

Params = dict[str, Any]


class Source(Protocol):
    """Where a pipeline's weights are.

    Attributes: name_or_path, variant and parts as `pipelines.open_pipeline` takes them.
    """

    name_or_path: str | Path
    variant: str | None
    parts: str

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters of one network, as `mapping.from_torch` does by `target`."""
        ...

    def tensors(self, name: str, network: nnx.Module) -> dict[str, Any]:
        """Opens the tensors of one network by PyTorch key, in the dtype of the file."""
        ...


@dataclass(frozen=True)
class DiffusersSource:
    """A diffusers folder, or a model on the hub whose weights are downloaded at first use."""

    name_or_path: str | Path
    variant: str | None = None
    parts: str = ""

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters of one network, as `mapping.from_torch` does by `target`."""
        folder = self._folder()
        tensors = diffusers.load_component(folder, name, variant=self.variant, read=files.open_tensors)[1]
        return mapping.from_torch(network, tensors, what=str(folder / name), target=target)

    def tensors(self, name: str, network: nnx.Module) -> dict[str, Any]:
        """Opens the tensors of one network by PyTorch key, in the dtype of the file."""
        return diffusers.load_component(self._folder(), name, variant=self.variant, read=files.open_tensors)[1]

    def _folder(self) -> Path:
        return diffusers.resolve_pipeline(self.name_or_path, variant=self.variant)


@dataclass(frozen=True)
class OrbaxSource:
    """A folder that convert/from_diffusers.py wrote."""

    folder: Path
    variant: None = None
    parts: str = ""

    @property
    def name_or_path(self) -> Path:
        """The folder, by the name that every source has for it."""
        return self.folder

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters of one network; NumPy arrays for the leaves of `target` without a sharding."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def place(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

        params = orbax.load_pipeline_checkpoint(self.folder, {name: jax.tree.map(place, target)})[name]
        return jax.tree.map(lambda leaf, array: array if leaf.sharding else np.asarray(array), target, params)

    def tensors(self, name: str, network: nnx.Module) -> dict[str, Any]:
        """Reads the tensors of one network by PyTorch key, in the dtype of the checkpoint."""
        stored = orbax.stored_dtypes(self.folder, name, mapping.params_of(network))
        return mapping.to_torch(network, self.load(name, network, stored))


@dataclass(frozen=True)
class SingleFileSource:
    """A checkpoint of one file (`weights.single_file`). places: where its networks are, by component."""

    name_or_path: Path
    places: Mapping[str, single_file.Place]
    variant: str | None = None
    parts: str = ""

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters of one network, as `mapping.from_torch` does by `target`."""
        return mapping.from_torch(
            network, self._read(name, network), what=f"{self.name_or_path}: {name}", target=target
        )

    def tensors(self, name: str, network: nnx.Module) -> dict[str, Any]:
        """Opens the tensors of one network by PyTorch key; those in fp8 as bfloat16, which holds the same numbers."""
        tensors = self._read(name, network)
        return {
            key: array.astype(jnp.bfloat16) if array.dtype.itemsize == 1 else array for key, array in tensors.items()
        }

    def _read(self, name, network):
        return single_file.read_network(self.name_or_path, name, self.places[name], network, variant=self.variant)


@dataclass(frozen=True)
class MixedSource:
    """A model of which some networks come from files of their own. replaced: their sources, by component."""

    base: Source
    replaced: Mapping[str, Source]
    parts: str

    @property
    def name_or_path(self) -> str | Path:
        """The model's name, without its parts."""
        return self.base.name_or_path

    @property
    def variant(self) -> str | None:
        """The model's variant."""
        return self.base.variant

    def load(self, name: str, network: nnx.Module, target: Params) -> Params:
        """Loads the parameters of one network, as `mapping.from_torch` does by `target`."""
        return self.replaced.get(name, self.base).load(name, network, target)

    def tensors(self, name: str, network: nnx.Module) -> dict[str, Any]:
        """Opens the tensors of one network by PyTorch key."""
        return self.replaced.get(name, self.base).tensors(name, network)
