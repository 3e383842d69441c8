"""Ownership of a workdir: a run continues in its own, and in no other's."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imagereward_jax.config import flat_fields
from imagereward_jax.models.lora import ATTENTION
from imagereward_jax.recipes import default_config
from imagereward_jax.storage.files import is_temporary, write_text
from imagereward_jax.storage.folders import refuse_existing

CONFIG, DONE, LOCK = "config.json", "done.json", ".lock"
STARTED = "started.json"  # see `progress.started`
CLASS_IMAGES = "class_images"  # what a run makes of a model before it has a config there
# What a run makes in its workdir.
FOLDERS = ("samples", "checkpoints", "damaged_checkpoints", "export", "profile", "wandb", CLASS_IMAGES)
FILES = (CONFIG, STARTED, DONE, "metrics.jsonl", "report.html")
FILES += ("prompts.jsonl", "base_embeddings.npz", "wandb_run.json")
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


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir.

    Raises:
        FileNotFoundError: there is none. WorkdirError: its config is of another version, or cannot be read.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the workdir of a run")
    try:
        there = dict(flat_fields(json.loads(path.read_bytes())))
        config = default_config(there["method.name"])
        config.update_from_flattened_dict({name: _tuples(value) for name, value in there.items()})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} is not the config of a run of this version: {error}") from error
    return config


def _tuples(value):
    return tuple(value) if isinstance(value, list) else value


def is_complete(workdir: Path, config: Any) -> bool:
    """Whether the run reached its last step, or was stopped by the present config.stop, and left export and report."""
    done = read_done(workdir)
    if done is None:
        return False
    return done["step"] >= config.steps or ("stop" in done and done["stop"] == json.loads(config.stop.to_json()))


def read_done(workdir: Path) -> dict[str, Any] | None:
    """What done.json says; None if there is none, or none that can be read: then the run ends anew."""
    try:
        done = json.loads((workdir / DONE).read_bytes())
        return done if isinstance(done["step"], int) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def begin(workdir: Path, config: Any, files: Mapping[str, str]) -> None:
    """Writes config.json and `files` ({name: text}), and removes what kills left of single files.

    Process 0 does it, with the lock.
    """
    for folder in (workdir, workdir / "samples"):
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            path.unlink(missing_ok=True)
    write_text(workdir / CONFIG, json.dumps(json.loads(config.to_json()), indent=2))
    for name, text in files.items():
        write_text(workdir / name, text)


def check_export(workdir: Path, marker: str) -> None:
    """Refuses an export/ that no run wrote, before training: it is not replaced.

    Raises:
        WorkdirError: naming it.
    """
    try:
        refuse_existing(workdir / "export", overwrite=True, marker=marker)
    except FileExistsError as error:
        raise WorkdirError(f"{error}: move it away, or choose another --workdir") from error


def check_workdir(workdir: Path, config: Any) -> None:
    """Refuses a workdir that is not this run's. A field that the run did not have yet had what is now its default.

    Raises:
        WorkdirError: naming the fields that differ, or the files of something else.
    """
    _check_writable(workdir)
    path = workdir / CONFIG
    if not path.exists():
        if workdir.is_dir() and any(one.name != CLASS_IMAGES and not is_temporary(one) for one in workdir.iterdir()):
            raise WorkdirError(f"{workdir} exists and is not the workdir of a run: choose another --workdir")
        return
    for name in (*FOLDERS, *FILES):
        if (workdir / name).exists() and (workdir / name).is_dir() != (name in FOLDERS):
            kind = "folder" if name in FOLDERS else "file"
            raise WorkdirError(f"{workdir / name}: a run has a {kind} there; move it away, or choose another --workdir")
    try:
        there = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WorkdirError(f"{path} is not valid JSON ({error}): choose another --workdir") from error
    if not isinstance(there, dict):
        raise WorkdirError(f"{path} does not hold the fields of a config: choose another --workdir")
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


def fields_and_defaults(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields of a config, those of its method's defaults), each {"a.b": value for JSON}."""
    return tuple(dict(flat_fields(json.loads(tree.to_json()))) for tree in (config, default_config(config.method.name)))


def is_within(name: str, sections: Iterable[str]) -> bool:
    """Whether the field "a.b" is one of `sections`, or inside one."""
    return any(name == section or name.startswith(f"{section}.") for section in sections)
