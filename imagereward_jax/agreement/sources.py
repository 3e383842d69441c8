"""Human rankings of images: test files of ImageReward and of others, and the shapes world."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.groups import has_rankings, load_groups, read_groups
from imagereward_jax.data.images import find_image, image_suffixes
from imagereward_jax.data.prompts import SHAPES_PREFIX, table_prompts
from imagereward_jax.data.tables import Table, check_texts, column_values, read_table, row_names

SHAPES_GROUPS = 100


class RankedPrompt(NamedTuple):
    """One prompt with its images (paths, bytes, arrays or `RowImage`s) and their human ranks: 1 is best, None unranked.

    `labels` names the images, if they have names.
    """

    id: str
    prompt: str
    images: tuple[Any, ...]
    ranks: tuple[float | None, ...]
    labels: tuple[str, ...] = ()


class Generations(NamedTuple):
    """Images of several generators for the same prompts: `images[generator]` is a list of paths per prompt."""

    ids: list[str]
    prompts: list[str]
    images: dict[str, list[list[Path]]]


def load_evaluation(
    source: str | os.PathLike,
    images: str | os.PathLike | None = None,
    limit: int | None = None,
    spoilt: bool = True,
    prompt_column: str | None = None,
) -> list[RankedPrompt] | Generations:
    """Reads evaluation data.

    Args:
        source: a .json, .jsonl or .parquet of {"id", "prompt", "generations": [images], "ranking": [1 is best, null
            for not ranked]}; rankings in another form that `groups.load_groups` reads (HPDv2, Pick-a-Pic,
            ImageRewardDB, pairs), also as `datasets`; prompts in a form of `load_prompts` with `images`; or
            "shapes:held_out", "shapes:train".
        images: folder that paths of images are relative to (default: the file's folder); without rankings the folder
            of MODEL/ID_K.png (or another image format).
        limit: number of prompts to read (shapes: 100 by default).
        spoilt: for shapes only, see `ShapesGroups`.
        prompt_column: of prompts without rankings; by default as of `load_prompts`.

    Returns:
        A list of `RankedPrompt`, or `Generations`.

    Raises:
        DataError, MissingDataError: the message names file and row; every path is checked here.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit} should be at least 1")
    if str(source).startswith(SHAPES_PREFIX):
        if images is not None:
            raise DataError(f"--images is for files; {source} draws its own images")
        return _shapes(source, limit or SHAPES_GROUPS, spoilt)
    if not spoilt:
        raise DataError(f"--no-spoilt is for shapes:held_out and shapes:train; the data is {source}")
    if images is not None and not Path(images).is_dir():
        raise missing_file(images, "folder of images")
    table = read_table(source)
    folder = Path(images) if images is not None else table.folder
    rankings = has_rankings(table)
    if rankings and prompt_column is not None:
        raise DataError("--prompt-column is for prompts alone; this data has people's rankings in it")
    ids = row_names(table)[:limit]
    if "ranking" in (table.columns() or ()):
        return _ranked(table, check_texts(table, column_values(table, "prompt"), "prompt")[:limit], ids, folder)
    if rankings:
        groups = read_groups(table, folder)[:limit]
        return [RankedPrompt(group.id, group.prompt, group.paths, group.ranking) for group in groups]
    if images is None:
        raise DataError(
            f"{table.name}: no rankings in it, only {', '.join(table.columns() or ['plain text'])}; expected a form of "
            "docs/files.md (as id, prompt, generations, ranking). For prompts alone also give --images DIR, with the "
            "images in DIR/MODEL/ID_K.png"
        )
    return find_generations(table, table_prompts(table, prompt_column, "--prompt-column")[:limit], ids, folder)


def _shapes(source, count, spoilt):
    groups = load_groups(source, image_size=64, shapes={"size": count, "spoilt": spoilt})
    items = (groups[i] for i in range(count))
    return [
        RankedPrompt(str(i), item["prompt"], tuple(item["images"]), tuple(int(rank) for rank in item["ranking"]))
        for i, item in enumerate(items)
    ]


def _ranked(table, prompts, ids, folder):
    generations, rankings = column_values(table, "generations"), column_values(table, "ranking")
    groups = []
    for i, prompt in enumerate(prompts):
        where = table.where(i)
        ranks = _check_ranking(generations[i], rankings[i], where)
        found = tuple(find_image(value, folder, where) for value in generations[i])
        groups.append(RankedPrompt(ids[i], prompt, found, ranks))
    return groups


def _check_ranking(generations, ranking, where):
    if not isinstance(generations, list) or not generations:
        raise DataError(f"{where}: 'generations' must be a list of images; got {generations!r}")
    if not isinstance(ranking, list) or len(ranking) != len(generations):
        raise DataError(
            f"{where}: 'ranking' must be a list of {len(generations)} ranks, as many as images; got {ranking!r}"
        )
    for rank in ranking:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float)) or not rank >= 1):
            raise DataError(
                f"{where}: 'ranking' must hold numbers from 1 (the best) up, or null for an image that was not "
                f"ranked; got {ranking!r}"
            )
    return tuple(ranking)


def find_generations(table: Table, prompts: list[str], ids: list[str], folder: Path) -> Generations:
    """Finds FOLDER/MODEL/ID_K.png, or another image format: K from 0, equally many for every prompt and model.

    Raises:
        DataError: there are no models, or an image is missing, one too many, or there in two formats.
    """
    models = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        raise DataError(f"{folder}: no folders in it; expected one per generator, with images ID_K.png")
    found = {}
    for model in models:
        names = _images_by_stem(folder / model)
        first = re.compile(rf"{re.escape(ids[0])}_\d+")
        count = sum(first.fullmatch(stem) is not None for stem in names)
        if count == 0:
            raise DataError(f"{folder / model}: no images {ids[0]}_K.png for the first prompt of {table.name}")
        for i, name in enumerate(ids):
            gone = [f"{name}_{k}.png" for k in range(count) if f"{name}_{k}" not in names]
            if gone:
                raise DataError(f"{table.where(i)}: {folder / model / gone[0]} is not there; each prompt needs {count}")
            if f"{name}_{count}" in names:
                more = names[f"{name}_{count}"]
                raise DataError(f"{table.where(i)}: {more} is one more than the {count} images of the first prompt")
        found[model] = [[names[f"{name}_{k}"] for k in range(count)] for name in ids]
    return Generations(ids, prompts, found)


def _images_by_stem(folder):
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in image_suffixes() and found.setdefault(path.stem, path) != path:
            raise DataError(f"{path}: there is also {found[path.stem].name}; keep one of them")
    return found
