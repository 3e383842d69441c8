"""What of a pipeline's weights trains and what is exported: whole networks, or an adapter (LoRA) of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import join, split, trainable_mask
from imagereward_jax.training.config import ConfigError
from imagereward_jax.weights import adapters
from imagereward_jax.weights.diffusers import INDEX


class Weights(NamedTuple):
    """The parts of an `Experiment` that follow from what trains.

    trainable: float32. frozen: the rest, as loaded. export: (trainable, folder) -> None. export_marker: a file of it.
    """

    trainable: dict
    frozen: dict
    export: Callable
    export_marker: str


def divide(config, pipeline, params, networks):
    """The `Weights` of a run that trains `networks` of a pipeline, or with config.lora.rank an adapter of them.

    Raises:
        ConfigError: config.lora.targets matches no layer. ValueError, FileNotFoundError: see `lora.read_adapter`.
    """
    rank = config.lora.rank
    if rank:
        params = join(params, add_adapter(config, pipeline, networks))
    trainable, frozen = split(params, trainable_mask(params, networks, lora=rank > 0))

    def export_model(trainable, folder):
        pipeline.save(folder, join(frozen, trainable))

    def export_adapter(trainable, folder):
        chosen = {name: pipeline.networks[name] for name in networks}
        options = {"rank": rank, "alpha": lora_alpha(config), "dtype": jax.numpy.dtype(config.lora.dtype)}
        adapters.write_adapter(folder, chosen, trainable, **options)

    if rank:
        return Weights(trainable, frozen, export_adapter, adapters.FILE)
    return Weights(trainable, frozen, export_model, INDEX)


def lora_alpha(config):
    """config.lora.alpha, of which None stands for the rank."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha


def add_adapter(config, pipeline, networks):
    """Gives the networks of a pipeline their slots; returns the low-rank parameters, new or config.lora.path's."""
    settings, alpha = config.lora, lora_alpha(config)
    there = adapters.read_adapter(settings.path, pipeline.networks) if settings.path else None
    if there is not None and set(there) != set(networks):
        raise ConfigError(
            f"config.lora.path={settings.path!r} adapts {', '.join(there)}; this run adapts {', '.join(networks)}"
        )
    added = {}
    for index, name in enumerate(networks):
        try:
            pipeline.add_lora(name, settings.targets, rank=settings.rank, alpha=alpha, dropout=settings.dropout)
        except ValueError as error:
            raise ConfigError(f"config.lora (rank={settings.rank}, targets of the {name}): {error}") from error
        network = pipeline.networks[name]
        if there is None:
            key = jax.random.fold_in(jax.random.key(config.seed), index)
            added[name] = jax.device_get(lora.init(network, key, settings.init))
        else:
            added[name] = adapters.low_rank_params(
                network, there[name], rank=settings.rank, alpha=alpha, what=f"config.lora.path={settings.path!r}"
            )
    return added
