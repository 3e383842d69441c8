"""Ownership of a workdir: a run continues in its own, and in no other's."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from imagereward_jax.models.lora import ATTENTION
from imagereward_jax.recipes import default_config

CONFIG, DONE = "config.json", "done.json"
CLASS_IMAGES = "class_images"  # what a run makes of a model before it has a config there
# Fields that may differ on resume: how long the run goes on, what it reports, and how (not which) numbers are computed;
# those then differ by rounding (mesh, optimization_level, model.remat).
MAY_CHANGE = (
    "steps",
    "log_every",
    "writers",
    "checkpoint",
    "eval",
    "stop",
    "data.workers",
    "mesh",
    "max_skipped",
    "profile",
    "compilation_cache",
    "optimization_level",
    "compile_effort",  # its name in runs from before
    "model.remat",
    "reward.remote",
)

NOW_NONE = {"lora.targets": ATTENTION}  # defaults that runs from before wrote, for which None stands now


class WorkdirError(ValueError):
    """The workdir belongs to another run, or to something else."""


def is_complete(workdir: Path, config: Any) -> bool:
    """Whether the run reached its last step, or was stopped by the present config.stop, and left export and report."""
    path = workdir / DONE
    if not path.exists():
        return False
    done = json.loads(path.read_text())
    return done["step"] >= config.steps or ("stop" in done and done["stop"] == json.loads(config.stop.to_json()))


def check_workdir(workdir: Path, config: Any) -> None:
    """Refuses a workdir that is not this run's. A field that the run did not have yet had what is now its default.

    Raises:
        WorkdirError: naming the fields that differ, or the files of something else.
    """
    _check_writable(workdir)
    path = workdir / CONFIG
    if not path.exists():
        if workdir.is_dir() and any(path.name != CLASS_IMAGES for path in workdir.iterdir()):
            raise WorkdirError(f"{workdir} exists and is not the workdir of a run: choose another --workdir")
        return
    try:
        there = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WorkdirError(f"{path} is not valid JSON ({error}): choose another --workdir") from error
    now, default = fields_and_defaults(config)
    there = {name: default[name] for name in now.keys() & default.keys()} | dict(flat_fields(there))
    for name, value in NOW_NONE.items():
        if there.get(name) == value and now.get(name) is None:
            there[name] = None
    names = sorted(name for name in there.keys() | now.keys() if not is_within(name, MAY_CHANGE))
    differ = [name for name in names if there.get(name) != now.get(name)]
    if differ:
        changes = "; ".join(f"config.{n}: {there.get(n)!r} there, {now.get(n)!r} now" for n in differ[:6])
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise WorkdirError(
            f"{workdir} holds another run ({changes}{more}): choose another --workdir, or pass what that run had"
        )


def _check_writable(workdir):
    """Refuses a workdir that is no folder, or that could not be made or written, before weights are read for it."""
    try:
        there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, a folder that must not be read
        raise WorkdirError(f"{workdir}: {error.strerror}: choose another --workdir") from error
    if not there.is_dir():
        raise WorkdirError(f"{workdir}: {there} is not a folder: choose another --workdir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise WorkdirError(f"{workdir}: {there} cannot be written: choose another --workdir")


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, as ("a.b", value)."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def fields_and_defaults(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields of a config, those of its method's defaults), each {"a.b": value for JSON}."""
    return tuple(dict(flat_fields(json.loads(tree.to_json()))) for tree in (config, default_config(config.method.name)))


def is_within(name: str, sections: Iterable[str]) -> bool:
    """Whether the field "a.b" is one of `sections`, or inside one."""
    return any(name == section or name.startswith(f"{section}.") for section in sections)
