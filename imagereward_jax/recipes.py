"""Configs of runs: the defaults of a method, the check of a whole config, and recipes that build on others.

A file in `configs/` starts from `default_config(method)` and changes what its recipe needs. Every field can be
overridden on the command line (`--config.optimizer.learning_rate=1e-4`).
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from imagereward_jax.config import ConfigError, Section, did_you_mean, flat_fields
from imagereward_jax.methods.base import find_method
from imagereward_jax.sections.parts import PARTS, judge, reward_term
from imagereward_jax.sections.run import RUN_SECTIONS

__all__ = ["default_config", "judge", "method_settings", "recipe_beside", "reward_term", "validate"]


def default_config(method: str) -> ConfigDict:
    """The config that recipes start from.

    Args:
        method: the name of a module in `imagereward_jax.methods` ("refl"), or of one of your own
            ("my_package.my_method"); it decides which sections the config has.

    Raises:
        ConfigError: there is no such method.
    """
    config = ConfigDict()
    kind = find_method(method).Config
    for section in _sections(kind):
        part = config
        if section.location:
            part = config[section.location] = config.get(section.location, ConfigDict())
        for name, (type_, optional, default) in section.field_types().items():
            part[name] = config_dict.placeholder(type_) if optional else default
            if optional and default is not None:
                part[name] = default
    config.method.name = method
    config.update_from_flattened_dict(kind.defaults)
    return config


def sections_of(config: ConfigDict) -> Iterator[type[Section]]:
    """The sections that a config consists of, by its method.

    Raises:
        ConfigError: there is no such method.
    """
    return _sections(find_method(config.method.name).Config)


def _sections(kind) -> Iterator[type[Section]]:
    yield from RUN_SECTIONS
    yield from (PARTS[name] for name in ("model", "workers", *kind.uses))
    yield kind


def recipe_beside(file: str | Path, name: str, method: str | None = None) -> ConfigDict:
    """The config of the recipe `name`.py in the folder of `file`, for recipes that change a few fields of another.

    Args:
        method: another than the recipe's. Fields that differ from the defaults of the recipe's own method, and that
            `method` has too, are set in the default config of `method`.
    """
    spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config()
    if method is None:
        return config
    other = default_config(method)
    given, untouched, fields = (
        dict(flat_fields(tree.to_dict())) for tree in (config, default_config(config.method.name), other)
    )
    changed = {name: value for name, value in given.items() if name in fields and untouched.get(name) != value}
    other.update_from_flattened_dict(changed)
    return other


def validate(config: ConfigDict) -> None:
    """Refuses a config that cannot work.

    Raises:
        ConfigError: naming the field, its value and what is expected; an unknown field with its nearest neighbour.
    """
    kind = find_method(config.method.name).Config
    _check_fields(config, default_config(config.method.name))
    read = [section.read(config[section.location] if section.location else config) for section in _sections(kind)]
    for section in read:
        section.check(config)


def method_settings(config: ConfigDict) -> Section:
    """config.method as the typed `Config` of its method."""
    return find_method(config.method.name).Config.read(config.method)


def _check_fields(config: ConfigDict, default: ConfigDict, path: str = "config") -> None:
    """Refuses fields that `default` lacks (misspelt in a config file), and sections or fields that were removed."""
    for name in config:
        if name not in default:
            raise ConfigError(f"{path}.{name} is not a field of this method{did_you_mean(name, default)}")
    for name, value in default.items():
        if name not in config:
            raise ConfigError(
                f"{path}.{name} is missing: start the config from default_config, and change fields one by one"
            )
        if isinstance(value, ConfigDict) and len(value):  # empty ones (architecture, terms) hold what a recipe puts in
            if not isinstance(config[name], ConfigDict):
                raise ConfigError(f"{path}.{name}={config[name]!r}: expected the section that default_config has")
            _check_fields(config[name], value, f"{path}.{name}")
