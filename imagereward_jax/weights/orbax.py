"""Pipelines as Orbax checkpoints: parameters in Flax's layout, of which each device reads only its part.

FOLDER/checkpoint.json   classes and settings of the pipeline, every network and the scheduler
FOLDER/unet/, vae/, ...  one Orbax checkpoint per network
FOLDER/tokenizer/, ...   the tokenizers' files
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from imagereward_jax.storage.errors import WriteError, way_out
from imagereward_jax.storage.folders import new_folder
from imagereward_jax.storage.names import single_name
from imagereward_jax.weights.diffusers import check_fields, copy_tokenizer
from imagereward_jax.weights.files import WeightsError, read_json
from imagereward_jax.weights.generation import Generation, write_generation
from imagereward_jax.weights.mapping import CheckpointMismatch

MANIFEST = "checkpoint.json"
FORMAT = "imagereward-jax pipeline 3"
# Arrays are stored in pieces of at most this size, so that a device need not read much beyond its own part.
_CHUNK_BYTES = 4 * 2**20


def save_pipeline_checkpoint(
    folder: str | Path,
    networks: Iterable[tuple[str, dict[str, Any], dict[str, Any]]],
    *,
    pipeline_class: str,
    scheduler_config: dict[str, Any],
    tokenizers: Mapping[str, str | Path],
    fields: dict[str, Any] | None = None,
    generation: Generation | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a pipeline as an Orbax checkpoint, whole or not at all.

    Args:
        networks: iterable of (name, config.json's content, params), read one at a time, so that only one network need
            be in memory. jax arrays are written with less memory than NumPy arrays.
        pipeline_class: as model_index.json names it.
        scheduler_config: the content of scheduler_config.json. tokenizers: folder to copy by name.
        fields: settings of the pipeline, `diffusers.Index.fields`. generation: the `Generation` to state, or None.

    Raises:
        FileExistsError: `folder` is there and not empty, and `overwrite` is false or it is not such a checkpoint.
        WriteError: it could not be written.
    """
    with new_folder(folder, overwrite=overwrite, marker=MANIFEST) as partial:
        configs = {}
        for name, config, params in networks:
            _save_params(partial / name, params)
            configs[name] = config
        for name, source in tokenizers.items():
            copy_tokenizer(Path(source), partial / name)
        if generation is not None:
            write_generation(partial, generation)
        manifest = {
            "format": FORMAT,
            "pipeline_class": pipeline_class,
            "components": configs,
            "scheduler": scheduler_config,
            "tokenizers": sorted(tokenizers),
            "fields": fields or {},
            "bytes": {str(file.relative_to(partial)): file.stat().st_size for file in _files(partial)},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint: "pipeline_class", "components" (config by name), "scheduler", "tokenizers"
    (names) and "fields" (settings of the pipeline).

    Raises:
        FileNotFoundError: `folder` is not there. StorageError: it is not such a checkpoint, or names a path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / MANIFEST).is_file():
        raise WeightsError(f"{folder}: no {MANIFEST}, so it is no checkpoint that convert/from_diffusers.py wrote")
    manifest = read_json(folder / MANIFEST, infinite=True)
    if manifest.get("format") != FORMAT:
        raise WeightsError(
            f"{folder / MANIFEST}: format is {manifest.get('format')!r}, expected {FORMAT!r}; convert it again"
        )
    kinds = {**dict.fromkeys(("components", "scheduler", "fields", "bytes"), dict), "tokenizers": list}
    for field, kind in kinds.items():
        if not isinstance(manifest.get(field), kind):
            words = "an object" if kind is dict else "a list"
            raise WeightsError(f"{folder / MANIFEST}: {field}={manifest.get(field)!r:.100}: expected {words}")
    for field in ("components", "tokenizers"):
        for name in manifest[field]:
            single_name(name, f"{folder / MANIFEST}: {field}")
    for name, config in manifest["components"].items():
        if not isinstance(config, dict):
            raise WeightsError(f"{folder / MANIFEST}: components.{name}={config!r:.100}: expected an object")
    check_fields(manifest["fields"], f"{folder / MANIFEST}: fields")
    for file in manifest["bytes"]:
        for part in file.split("/"):
            single_name(part, f"{folder / MANIFEST}: bytes: {file!r}")
    return manifest


def load_pipeline_checkpoint(folder: str | Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Reads networks from a checkpoint, each array straight to its devices.

    Args:
        folder: a folder that `save_pipeline_checkpoint` wrote.
        abstract: by component, the nested dict of `jax.ShapeDtypeStruct` to read. Shapes have to be those of the
            checkpoint; dtypes may differ (arrays are cast); shardings say where each part goes. Components that are
            left out are not read.

    Returns:
        dict of component to nested dict of jax arrays.

    Raises:
        FileNotFoundError, WeightsError: the folder is absent, not such a checkpoint, or damaged.
        CheckpointMismatch: naming every missing, unexpected and misshapen parameter.
    """
    known = read_manifest(folder)["components"]
    for name in abstract:
        if name not in known:
            raise WeightsError(f"{folder}: holds no {name!r}, only {', '.join(sorted(known))}")
        _refuse_damaged(Path(folder), name)
    return {name: _load_params(Path(folder).absolute() / name, tree) for name, tree in abstract.items()}


def stored_dtypes(folder: str | Path, name: str, params: dict[str, Any]) -> dict[str, Any]:
    """One network's parameters as `jax.ShapeDtypeStruct`, with the shapes of `params` and the checkpoint's dtypes.

    Raises:
        FileNotFoundError, WeightsError: as for `load_pipeline_checkpoint`.
    """
    import orbax.checkpoint as ocp

    _refuse_damaged(Path(folder), name)
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(Path(folder).absolute() / name).item_metadata.tree
    # Orbax turns the numbers of layers into strings.
    dtypes = {tuple(map(str, key)): leaf.dtype for key, leaf in traverse_util.flatten_dict(stored).items()}
    flat = traverse_util.flatten_dict(params)
    structs = {key: jax.ShapeDtypeStruct(leaf.shape, dtypes[tuple(map(str, key))]) for key, leaf in flat.items()}
    return traverse_util.unflatten_dict(structs)


def _save_params(path, params):
    import orbax.checkpoint as ocp

    _refuse_full_disk(path, params)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    with _quiet(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        try:
            checkpointer.save(path, args=ocp.args.StandardSave(params, save_args=save_args))
        except Exception as error:  # Orbax passes on errors of many kinds from its storage layer
            raise WriteError(f"{path}: could not be written ({_reason(error)}); {way_out()}") from error


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _refuse_damaged(folder, name):
    """Checks that every file of a network is there in full: the first thing to break when a copy is cut short."""
    sizes = read_manifest(folder)["bytes"]
    for file, size in sizes.items():
        path = folder / file
        if not file.startswith(f"{name}/"):
            continue
        found = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is not there"
        if found != f"has {size:,} bytes":
            raise WeightsError(f"{path} {found}, expected {size:,}; copy or convert the checkpoint again")


def _refuse_full_disk(path, params):
    """Checks for room on the disk before Orbax writes, as each of its many threads would report a full disk."""
    needed = sum(array.nbytes for array in jax.tree.leaves(params))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise WriteError(f"{path}: needs {needed / 2**20:,.1f} MiB, but only {free / 2**20:,.1f} MiB of disk are free")


def _load_params(path, abstract):
    import orbax.checkpoint as ocp

    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
            _check(path, stored, abstract)
            return checkpointer.restore(path, abstract)
        except CheckpointMismatch:
            raise
        except Exception as error:  # as above
            raise WeightsError(f"{path}: could not be read ({_reason(error)}); convert it again") from error


def _check(path, stored, abstract):
    """Compares shapes by name, to refuse a wrong checkpoint before anything is read."""
    stored, wanted = (
        {".".join(map(str, key)): tuple(leaf.shape) for key, leaf in traverse_util.flatten_dict(tree).items()}
        for tree in (stored, abstract)
    )
    lines = [f"{key}: missing" for key in sorted(wanted.keys() - stored.keys())]
    lines += [f"{key}: unexpected" for key in sorted(stored.keys() - wanted.keys())]
    lines += [
        f"{key}: {stored[key]} in the checkpoint, {shape} in the network"
        for key, shape in sorted(wanted.items())
        if key in stored and stored[key] != shape
    ]
    if lines:
        raise CheckpointMismatch("\n  ".join([f"{path} does not fit the network:", *lines]))


@contextlib.contextmanager
def _quiet():
    """Silences Orbax, which logs every array, and every error that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
