"""Chooses which weights train, loads all of them into the dtypes and shards that they are held in, and exports them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import Export, Method, Params
from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import split, trainable_mask
from imagereward_jax.training.mesh import weight_shardings
from imagereward_jax.training.program import placed
from imagereward_jax.weights import adapters
from imagereward_jax.weights.diffusers import INDEX


class Weights(NamedTuple):
    """The weights of a run by component: float32 ones that train, and the others as they are held."""

    trainable: Params
    frozen: Params


def load(parts: Any, method: Method) -> Weights:
    """The weights that a method reads, divided by what trains; shapes if the parts are abstract.

    Raises:
        ConfigError: see `add_adapter`. FileNotFoundError, ValueError: weights are absent or do not fit.
    """
    shapes = {name: tree for name, tree in parts.shapes().items() if method.reads is None or name in method.reads}
    if parts.adapts:
        trainable, frozen = initial_adapter(parts), held(parts, shapes, trained={})
    else:
        names = method.trains
        mask = names(shapes) if callable(names) else trainable_mask(shapes, names)
        trained = split(shapes, mask)[0]
        whole = {name: held(parts, {name: tree}, trained.get(name, {}))[name] for name, tree in shapes.items()}
        trainable, frozen = split(whole, mask)
    if parts.abstract:
        return Weights(trainable, frozen)
    if parts.adapts:
        loaded = parts.load(placed(frozen, weight_shardings(parts.mesh, frozen)))
        return Weights(jax.device_put(trainable, weight_shardings(parts.mesh, trainable)), loaded)
    loaded = parts.load(placed(whole, weight_shardings(parts.mesh, whole)))
    return Weights(*split(loaded, mask))


def held(parts: Any, shapes: Params, trained: Params) -> Params:
    """Shapes of components in the dtypes that they are held in: float32 what trains, the VAE and the denoiser in those
    of their arithmetic, a reward as it is opened (its norms and head stay float32)."""
    found = {}
    for name, tree in shapes.items():
        if name == "reward":
            found[name] = tree
            continue
        dtype = parts.component_dtype(name)

        def convert(shape, train, dtype=dtype):
            return jax.ShapeDtypeStruct(shape.shape, jnp.float32 if train else dtype)

        found[name] = _map_with(tree, trained, convert)
    return found


def _map_with(tree, trained, convert):
    """`convert(leaf, whether it is in `trained`)` for each leaf of a nested dict."""
    return {
        name: _map_with(value, (trained or {}).get(name, {}), convert)
        if isinstance(value, dict)
        else convert(value, name in (trained or {}))
        for name, value in tree.items()
    }


def initial_adapter(parts: Any) -> Params:
    """The low-rank parameters that training starts from: random, or config.lora.path's; shapes if abstract.

    Raises:
        ConfigError: config.lora.path adapts something else. ValueError, FileNotFoundError: see `read_adapter`.
    """
    config, settings = parts.config, parts.config.lora
    networks = {name: parts.pipeline.networks[name] for name in parts.pipeline.adapted}
    if parts.abstract or not settings.path:

        def draw(key):
            keys = {name: jax.random.fold_in(key, index) for index, name in enumerate(networks)}
            return {name: lora.init(network, keys[name], settings.init) for name, network in networks.items()}

        key = jax.random.key(config.seed)
        return jax.eval_shape(draw, key) if parts.abstract else jax.device_get(draw(key))
    what = f"config.lora.path={settings.path!r}"
    there = adapters.read_adapter(settings.path, parts.pipeline.networks)
    if there.keys() != networks.keys():
        raise ConfigError(f"{what} adapts {', '.join(there)}; this run adapts the {', '.join(networks)}")
    options = {"rank": settings.rank, "alpha": lora_alpha(config), "what": what}
    return {name: adapters.low_rank_params(network, there[name], **options) for name, network in networks.items()}


def lora_alpha(config: Any) -> float:
    """config.lora.alpha; the rank if None."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha


def reference(parts: Any, trainable: Params, cast: Callable[[Params], Params]) -> Params:
    """The weights that training starts from, of those that train, in the compute dtype; an adapter's B is zero."""

    def at_start(path, leaf):
        return jnp.zeros_like(leaf) if parts.adapts and path[-1].key == "lora_B" else jnp.copy(leaf)

    def make(trainable):
        return jax.tree_util.tree_map_with_path(at_start, cast(trainable))

    return jax.eval_shape(make, trainable) if parts.abstract else make(trainable)


def export_model(parts: Any, method: Method) -> Export:
    """The whole model as a diffusers folder: what trained, and the other components from the files they came from."""

    def write(components: Params, _: Any, folder: Path) -> None:
        parts.save_pipeline(folder, components)

    return Export(write, INDEX, tuple(method.trains))


def export_adapter(parts: Any) -> Export:
    """The adapter as diffusers' `load_lora_weights` takes it."""
    config, names = parts.config, tuple(parts.pipeline.adapted)

    def write(components: Params, _: Any, folder: Path) -> None:
        _, low_rank = split(components, _without_adapter(components))
        adapters.write_adapter(
            folder,
            {name: parts.pipeline.networks[name] for name in names},
            low_rank,
            rank=config.lora.rank,
            alpha=lora_alpha(config),
            dtype=np.dtype(jnp.dtype(config.lora.dtype)),
            generation=parts.generation,
        )

    return Export(write, adapters.FILE, names)


def _without_adapter(components):
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).startswith("lora_"), components)
