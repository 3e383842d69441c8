"""Reads a checkpoint's config.json into a frozen dataclass; settings that are not implemented are rejected."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Config = TypeVar("Config")
MAX_SIZE = 10_000_000  # of any number of a network's config
MAX_LAYERS = 1000  # layers are built one by one, before they are compared with the weights
LAYERS = (
    *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    *("num_hidden_layers", "num_layers", "depth"),
)
_EPSILONS = ("_eps", "_epsilon")  # how fields that a norm adds to a variance end
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}

# Fields that transformers writes into every config.json or uses only for initialisation.
TRANSFORMERS_FIELDS = (
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
)
# What diffusers' EMAModel writes beside a model's settings: numbers of the average.
EMA_FIELDS = (
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
)


class Fixed(NamedTuple):
    """The implemented values of a setting that is not read, and what another one says of the model."""

    values: Sequence[Any]
    why: str


def read_config(
    cls: type[Config],
    values: dict[str, Any],
    *,
    fixed: Mapping[str, Fixed | Sequence[Any]],
    ignored: Collection[str] = (),
) -> Config:
    """Builds the dataclass `cls` from a checkpoint's config.json.

    Args:
        cls: a dataclass; its fields are the supported settings. Lists become tuples.
        values: the content of config.json.
        fixed: name -> implemented values, for settings that are not fields of `cls`.
        ignored: names without effect on the network, beside those that `check_unread` passes.

    Raises:
        ValueError: a field or value is not implemented; the message names it.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    kept = {}
    for name, value in values.items():
        if name in fields:
            kept[name] = value
        else:
            check_unread(cls.__name__, name, value, fixed=fixed, harmless=ignored)
    return cls(**check_types(cls, kept, cls.__name__))


def check_unread(
    where: str,
    name: str,
    value: Any,
    *,
    fixed: Mapping[str, Fixed | Sequence[Any]],
    harmless: Collection[str] = (),
) -> None:
    """The rule for a field that nothing reads, in configs of networks and of schedulers alike.

    One of `fixed` has to have an implemented value. `harmless` ones, those of averages and bookkeeping (a leading
    underscore) never refuse a model. Any other does: nobody knows what it changes.

    Args:
        where: how errors name the file or part.

    Raises:
        ValueError: naming the field, its value, and what it means if that is known.
    """
    if name in fixed:
        choices, why = fixed[name] if isinstance(fixed[name], Fixed) else (fixed[name], "")
        _check_value(where, name, value, choices, f": {why}" if why else "")
    elif not name.startswith("_") and name not in EMA_FIELDS and name not in harmless:
        raise ValueError(f"{where}: the field {name!r} (value {value!r:.100}) is not known here; remove it if unused")


def check_types(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks values from JSON against the annotations of a dataclass; lists become tuples.

    Args:
        where: how errors name the file or part.

    Raises:
        ValueError: naming field, value and what is expected; also a size beyond reason, and what a norm cannot add.
    """
    hints = typing.get_type_hints(cls)
    checked = {name: _as_tuple(value) for name, value in values.items()}
    for name, value in checked.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name}={values[name]!r:.100}: expected {_words(hints[name])}")
        if name.endswith(_EPSILONS) and not 0 < value < 1:
            raise ValueError(f"{where}: {name}={value}: expected a number above 0 and below 1")
        most = MAX_LAYERS if name in LAYERS else MAX_SIZE
        for number in _flat(value):
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{where}: {name}={number}: expected at most {most:,}")
    return checked


def _as_tuple(value):
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _as_list(value):
    return list(map(_as_list, value)) if isinstance(value, list | tuple) else value


def _flat(value):
    return [item for part in value for item in _flat(part)] if isinstance(value, tuple) else [value]


def _fits(value, hint):
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        expected = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(expected) and all(map(_fits, value, expected))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint if hint in _KINDS else True


def _words(hint):
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} times "
        return f"a list of {count}{_words(inner[0])}"
    return _KINDS.get(hint, str(hint))


def write_config(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass as in config.json: tuples become lists."""
    return {name: _as_list(value) for name, value in dataclasses.asdict(config).items()}


def check_choice(cls: type, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError if `value` is not one of `choices`."""
    _check_value(cls.__name__, name, value, choices)


def _check_value(where, name, value, choices, why=""):
    # 1 == True in Python, so types are compared too; 1 and 1.0 are the same setting.
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        listed = " or ".join(map(repr, choices))
        raise ValueError(f"{where}: {name}={value!r} is not implemented, only {listed}{why}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError if a field is not a whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not _is_positive(value):
            raise ValueError(f"{type(config).__name__}: {name}={value!r} should be a whole number of at least 1")


def check_all_positive(config: Any, *names: str) -> None:
    """Like `check_positive`; a field may also be a tuple of such numbers."""
    for name in names:
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if not items or not all(map(_is_positive, items)):
            raise ValueError(f"{type(config).__name__}: {name}={value!r} should be whole numbers of at least 1")


def _is_positive(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
