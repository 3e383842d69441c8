"""Typed sections of a run's config, and the errors that name their fields. Knows no method and no room.

A section is a frozen dataclass whose fields are documented where they are declared. `recipes.default_config` puts the
sections of a method together as an `ml_collections.ConfigDict`, which config files and the command line change;
`Section.read` turns the values back into the dataclass and checks them.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

# Beyond reason: more would only be found out after hours, or fill the memory.
MAX_INT, MAX_SIDE, MAX_STEPS = 2**31 - 1, 16_384, 10_000


class ConfigError(ValueError):
    """A config field has a value that cannot work; the message names the field and the way out."""


def field(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    choices: Iterable[Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a `Section` with bounds on its value; None is always allowed where the annotation allows it.

    Args:
        default, default_factory: its value in `recipes.default_config`.
        choices: the values that it may have.
        at_least, above, below, at_most: bounds on a number (or on each number of a tuple).
    """
    bounds = {"choices": choices if choices is None else tuple(choices)}
    bounds |= {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    metadata = {name: value for name, value in bounds.items() if value is not None}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


class Section:
    """Base of sections. `class Optimizer(Section, path="optimizer")`: its fields are config.optimizer's."""

    location: ClassVar[str] = ""

    def __init_subclass__(cls, path: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if path is not None:
            cls.location = path
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def field_types(cls) -> dict[str, tuple[type, bool, Any]]:
        """{field: (type, whether None is allowed, default)}."""
        hints, found = typing.get_type_hints(cls), {}
        for one in dataclasses.fields(cls):
            kinds = [hints[one.name]]
            if isinstance(kinds[0], types.UnionType) or typing.get_origin(kinds[0]) is typing.Union:
                kinds = list(typing.get_args(kinds[0]))
            plain = [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
            default = one.default_factory() if one.default is dataclasses.MISSING else one.default
            found[one.name] = (plain[0], type(None) in kinds, default)
        return found

    @classmethod
    def bounds(cls) -> dict[str, Mapping[str, Any]]:
        """{field: its bounds}, the arguments of `field` that were given."""
        return {one.name: one.metadata for one in dataclasses.fields(cls)}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The section of a config's values, each checked against the bounds of its field.

        Args:
            values: has at least the fields of the section.

        Raises:
            ConfigError: naming the field, its value and what is expected.
        """
        types_ = cls.field_types()
        for one in dataclasses.fields(cls):
            (kind, optional, _), name = types_[one.name], cls.name_of(one.name)
            if values[one.name] is None and not optional:
                raise ConfigError(f"{name}=None: expected a value of type {kind.__name__}")
            value = values[one.name]
            if (
                kind in (int, float)
                and value is not None
                and (isinstance(value, bool) or not isinstance(value, int if kind is int else numbers.Real))
            ):
                raise ConfigError(f"{name}={value!r:.200}: expected a {'whole ' if kind is int else ''}number")
            bounds = one.metadata
            if kind is int and not {"at_most", "below", "choices"} & bounds.keys():
                bounds = {**bounds, "at_most": MAX_INT}
                if "at_least" not in bounds and "above" not in bounds:
                    bounds["at_least"] = -MAX_INT
            check_value(name, value, bounds)
        return cls(**{one.name: values[one.name] for one in dataclasses.fields(cls)})

    @classmethod
    def name_of(cls, name: str) -> str:
        """How errors name a field: "config.optimizer.learning_rate"."""
        return ".".join(part for part in ("config", cls.location, name) if part)

    def check(self, config: Any) -> None:
        """Checks relations between fields, of this section and of the whole `config`; raises ConfigError."""


def check_value(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Checks a value against the bounds that `field` takes.

    Raises:
        ConfigError: naming the field, its value and what is expected.
    """
    choices = bounds.get("choices")
    if choices is not None and not isinstance(value, tuple):
        if value not in choices:
            expected = ", ".join(map(str, choices))
            raise ConfigError(f"{name}={value!r}: expected one of {expected}{did_you_mean(value, choices)}")
        return
    for one in value if isinstance(value, tuple) else (value,):
        if choices is not None and one not in choices:
            raise ConfigError(f"{name}: {one!r} is none of {', '.join(choices)}{did_you_mean(one, choices)}")
        if isinstance(one, float) and not math.isfinite(one):
            raise ConfigError(f"{name}={value}: expected a {'' if math.isnan(one) else 'finite '}number")
        _check_bounds(name, value, one, bounds)


def _check_bounds(name, value, one, bounds):
    if one is None:
        return
    low, high = bounds.get("at_least", bounds.get("above")), bounds.get("below", bounds.get("at_most"))
    if (low, high) != (None, None) and not isinstance(one, numbers.Real):
        raise ConfigError(f"{name}={value!r}: expected numbers")
    too_low = low is not None and not (one > low if "above" in bounds else one >= low)
    too_high = high is not None and not (one < high if "below" in bounds else one <= high)
    if not too_low and not too_high:
        return
    if low is not None and high not in (None, MAX_INT):
        ends = f"{plain(low)}, {plain(high)}"
        interval = f"{'(' if 'above' in bounds else '['}{ends}{')' if 'below' in bounds else ']'}"
        raise ConfigError(f"{name}={value}: expected a number in {interval}")
    if too_low:
        words = "a number above" if "above" in bounds else "at least"
    else:
        words = "a number below" if "below" in bounds else "at most"
    raise ConfigError(f"{name}={value}: expected {words} {plain(low if too_low else high)}")


def plain(number: float) -> str:
    """A number as people write it: 1048576, 0.5."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def require_given(config: Any, path: str, way_out: str = "") -> None:
    """Refuses an empty field.

    Args:
        config: the whole config. path: "data.prompts". way_out: what else the user may do, for the message.

    Raises:
        ConfigError: naming the field.
    """
    value = config
    for part in path.split("."):
        value = value[part]
    if not value:
        raise ConfigError(f"config.{path} is empty: pass --config.{path}=...{way_out}")


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, as ("a.b", value)."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def did_you_mean(word: Any, choices: Iterable[Any]) -> str:
    """(did you mean ...?)" for the nearest of `choices`, or ""."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
