"""The scale of an adapter as PEFT keeps it: in adapter_config.json, or as diffusers does, in the header of the file."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.weights import files
from imagereward_jax.weights.files import WeightsError

FILE = "adapter_config.json"
_HEADER = "lora_adapter_metadata"
# Field: (values that are read as PEFT reads them, why others are refused).
_CHOICES = {
    "peft_type": ((None, "LORA"), "only LoRA is implemented"),
    "init_lora_weights": (
        (None, True, False, "gaussian", "eva", "orthogonal"),
        "it changes the base model too, which an adapter does not show",
    ),
}


class Settings(NamedTuple):
    """PEFT's settings of one network, checked. where: how errors name their place."""

    where: str
    values: dict[str, Any]

    def scale(self, name: str, rank: int) -> float:
        """The factor of a layer's update: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

        Raises:
            WeightsError: the settings state another rank than the layer has.
        """
        stated = self._of(name, "rank_pattern", self.values.get("r", rank))
        if stated != rank:
            raise WeightsError(
                f"{self.where}: states rank {stated} for layer {name}, whose weights have rank {rank}: it belongs to "
                "another adapter"
            )
        alpha = self._of(name, "alpha_pattern", self.values["lora_alpha"])
        return alpha / rank**0.5 if self.values.get("use_rslora") else alpha / rank

    def _of(self, name, patterns, default):
        """The value of the first pattern that the layer's name ends in, as in PEFT's `get_pattern_key`."""
        for pattern, value in (self.values.get(patterns) or {}).items():
            ending = _literal(pattern)
            if name == ending or (name.endswith(f".{ending}") and not pattern.startswith("^")):
                return value
        return default


def read_settings(path: Path, keys: Iterable[str], networks: Iterable[str]) -> dict[str, Settings]:
    """Reads the settings of an adapter file by network; none for a file of a kind that has none.

    Args:
        keys: of the file's tensors. networks: those that it adapts.

    Raises:
        WeightsError: naming the field that is malformed or not implemented, or the adapter_config.json that is absent.
    """
    header = files.read_metadata(path).get(_HEADER) if path.suffix == ".safetensors" else None
    if header is not None:
        where = f"{path}: {_HEADER} in its header"
        return {name: _checked(where, values) for name, values in _by_network(where, header).items()}
    if path.stem != "adapter_model" and not any(key.startswith("base_model.model.") for key in keys):
        return {}
    beside = path.with_name(FILE)
    if not beside.is_file():
        raise WeightsError(f"{path}: PEFT wrote it and keeps its scale (lora_alpha) in {FILE}; put that file beside it")
    return dict.fromkeys(networks, _checked(str(beside), files.read_json(beside)))


def _by_network(where, text):
    """{"unet": {"lora_alpha": ...}} of a header's {"unet.lora_alpha": ...}."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise WeightsError(f"{where}: expected a JSON object, found a {type(entries).__name__}")
    settings = defaultdict(dict)
    for name, value in entries.items():
        network, dot, field = name.partition(".")
        settings[network if dot else "unet"][field if dot else name] = value
    return settings


def _checked(where, values):
    for field, (choices, reason) in _CHOICES.items():
        if values.get(field) not in choices:
            raise WeightsError(
                f"{where}: {field}={values[field]!r}: {reason}; merge the adapter into its model with PEFT "
                "(merge_and_unload) and open that model"
            )
    for field in ("lora_alpha", *(["r"] if "r" in values else [])):
        if not _is_number(values.get(field)):
            raise WeightsError(f"{where}: {field}={values.get(field)!r} should be a number")
    for field in ("alpha_pattern", "rank_pattern"):
        patterns = values.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            raise WeightsError(f"{where}: {field}={patterns!r} should map names of layers to numbers")
        for pattern in patterns:
            # As a regular expression, one that is made for it takes hours to match.
            if re.search(r"[\\^$*+?{}\[\]|()]", _literal(pattern)):
                raise WeightsError(
                    f"{where}: {field} has the regular expression {pattern!r}; only names of layers and their ends "
                    "are read: write out the layers that it stands for"
                )
    return Settings(where, values)


def _literal(pattern):
    return pattern.removeprefix("^").replace(r"\.", ".")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
