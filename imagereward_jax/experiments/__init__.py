"""Assembles a method with its pipeline, rewards and data, as a config describes it."""

import importlib


def build(config, mesh):
    """The `training.loop.Experiment` of a validated config.

    Args:
        config: with `config.method.name` one of `training.config.METHODS`.
        mesh: what the run's arrays are laid over.
    """
    return importlib.import_module(f"imagereward_jax.experiments.{config.method.name}").build(config, mesh)
