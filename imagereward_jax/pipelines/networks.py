"""The networks of a model by name: structure, random and stored weights, adapters.

The networks are kept as structure alone; their weights are an argument of every method, a dict
`{"unet": ..., "vae": ..., "text_encoder": ...}`, so that they can be cast, sharded, trained and frozen by the caller.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagereward_jax.models import lora
from imagereward_jax.weights import components, mapping
from imagereward_jax.weights.sources import Source

Params = dict[str, Any]


class Networks:
    """Networks of a model; a subclass says which they are.

    Attributes:
        networks: maps each of `components` to an abstract module (structure and shapes only).
        configs: maps the same names to their config dataclasses.
        source: the files that they were opened from (`weights.sources`); None if there are none.
        adapted: {network: names of its layers that `with_lora` adapted}.
        vae_dtype: of the VAE's arithmetic; never float16, in which SDXL's VAE overflows.
    """

    # The class of each network, as model_index.json names it.
    components: Mapping[str, str]

    def __init__(
        self,
        configs: Mapping[str, Any],
        *,
        source: Source | None,
        dtype: DTypeLike,
        vae_dtype: DTypeLike | None,
        remat: str,
    ):
        self.configs, self.source = configs, source
        self.adapted: dict[str, tuple[str, ...]] = {}
        dtype = jnp.dtype(dtype)  # layers compare it: a string would not be equal
        self.vae_dtype = _vae_dtype(dtype, vae_dtype)
        self._build = {
            name: functools.partial(
                components.build_network,
                class_name,
                configs[name],
                dtype=self.vae_dtype if name == "vae" else dtype,
                remat=remat,
            )
            for name, class_name in self.components.items()
        }
        self.networks = {name: _abstract(build) for name, build in self._build.items()}
        self._graphdefs = {name: nnx.split(network)[0] for name, network in self.networks.items()}

    def init(self, key: jax.Array, names: Sequence[str] | None = None) -> Params:
        """Draws random float32 weights for training from scratch, of the components `names` (None: of all)."""
        # Not jitted: initialisers compile once per shape, far sooner than one program of some hundred random draws.
        keys = jax.random.split(key, len(self._build))
        return {
            name: mapping.params_of(build(rngs=nnx.Rngs(params=network_key)))
            for (name, build), network_key in zip(self._build.items(), keys)
            if names is None or name in names
        }

    def abstract_params(self) -> Params:
        """The weights as `jax.ShapeDtypeStruct`."""
        return {name: mapping.params_of(network) for name, network in self.networks.items()}

    def load_params(self, target: Params | None = None) -> Params:
        """Reads the weights that the pipeline was opened with.

        Args:
            target: by component, a nested dict of `jax.ShapeDtypeStruct` as `abstract_params` gives them. It states the
                dtypes to hold the weights in. Leaves with a sharding become jax arrays, of which each device reads its
                own part. Components that are left out are not read. None: float32 NumPy arrays of everything.

        Raises:
            FileNotFoundError, ValueError: naming the file or tensors that are absent or do not fit, or saying that the
                pipeline has no files.
        """
        source = self._files()
        target = self.abstract_params() if target is None else target
        return {name: source.load(name, self.networks[name], part) for name, part in target.items()}

    def with_lora(self, name: str, targets: str, **options: Any) -> Self:
        """Returns a pipeline whose network `name` has low-rank parameters; `params[name]` holds them beside the others.

        This pipeline does not change: it computes without the adapter from the same weights.

        Args:
            targets, options: as for `models.lora.attach`. The adapted layers are in `adapted` of the result.

        Raises:
            ValueError: as `models.lora.attach`.
        """
        network = nnx.clone(self.networks[name])
        names = lora.attach(network, targets, **options)
        adapted = copy.copy(self)
        adapted.adapted = {**self.adapted, name: tuple(names)}
        adapted.networks = {**self.networks, name: network}
        adapted._graphdefs = {**self._graphdefs, name: nnx.split(network)[0]}
        return adapted

    def replaced(self, configs: Mapping[str, Any], **attributes: Any) -> Self:
        """Returns a pipeline with other settings for the networks that `configs` names, and other `attributes`."""
        other = copy.copy(self)
        vars(other).update(attributes, configs={**self.configs, **configs})
        builds = {
            name: functools.partial(
                self._build[name].func, self._build[name].args[0], config, **self._build[name].keywords
            )
            for name, config in configs.items()
        }
        networks = {name: _abstract(build) for name, build in builds.items()}
        other._build, other.networks = {**self._build, **builds}, {**self.networks, **networks}
        other._graphdefs = {name: nnx.split(network)[0] for name, network in other.networks.items()}
        return other

    def component_config(self, name: str) -> dict[str, Any]:
        """The content of a network's config.json, with its class."""
        return self.configs[name].to_dict() | components.label(self.components[name])

    def _tensors(self, name, params):
        """One network's tensors under PyTorch's names, from `params` or else from the files."""
        if name in params:
            return mapping.to_torch(self.networks[name], params[name])
        return self._files().tensors(name, self.networks[name])

    def _files(self):
        if self.source is None:
            raise ValueError("this pipeline was made from sizes alone and has no files of weights; open a folder")
        return self.source

    def _network(self, name, params):
        return nnx.merge(self._graphdefs[name], params[name])


def _abstract(build):
    return mapping.abstract(lambda: build(rngs=nnx.Rngs(0)))


def _vae_dtype(dtype, vae_dtype):
    """The dtype of the VAE's arithmetic; ValueError for float16, in which SDXL's overflows."""
    if vae_dtype is None:
        return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)
    if jnp.dtype(vae_dtype) == jnp.float16:
        raise ValueError("vae_dtype=float16: the VAE overflows in it; choose bfloat16 or float32")
    return jnp.dtype(vae_dtype)
