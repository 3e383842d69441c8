"""Ranked groups of images: what people prefer, for training and judging reward models.

Images are read, resized and cropped as scoring does it (`images.open_square`).
"""

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.prompts import SHAPES_PREFIX, shapes_captions
from imagereward_jax.data.shapes.sources import ShapesGroups
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column, read_table, row_names
from imagereward_jax.terminal import say

SHAPES_SIZE = 20_000


class RowImage(NamedTuple):
    """An image that stays in its table until it is needed: data sets of images do not fit in memory."""

    rows: Sequence
    index: int
    column: str
    item: int | None = None
    folder: Path | None = None

    def read(self, where: str) -> images.Encoded:
        """Reads the row and looks up its image, a path in it relative to `folder`."""
        value = self.rows[self.index][self.column]
        return images.find_image(value if self.item is None else value[self.item], self.folder, where)


def encoded(image: images.Encoded | RowImage, where: str) -> images.Encoded:
    """Reads an image of a group from its table, if it is still there."""
    return image.read(where) if isinstance(image, RowImage) else image


class Group(NamedTuple):
    """One prompt with its images: paths [K] and ranks [K], 1 is best; equal ranks are ties.

    `paths` may also hold encoded and decoded images, and `RowImage`s. `row`: the number of its row in the table.
    """

    id: str
    prompt: str
    paths: tuple[images.Encoded | RowImage, ...]
    ranking: tuple[int, ...]
    row: int = 0


def load_groups(
    source: str | os.PathLike,
    *,
    image_size: int = 224,
    shapes: dict[str, Any] | None = None,
    split: str = "train",
    images: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    image_rule: str = "shown",
) -> "Groups | ShapesGroups":
    """Loads ranked groups: item i is {"prompt": str, "images": float32 [K, S, S, 3], "ranking": int32 [K], 1 is best}.

    Args:
        source: "shapes:train" or "shapes:held_out"; or a table (.json, .jsonl, .parquet, a folder saved by `datasets`,
            a hub name) in one of these forms:
            {"prompt", "generations": [images], "ranking": [1 is best]}, as ImageReward publishes its test set and
            its training code reads;
            ImageRewardDB, one image a row: {"prompt_id", "prompt", "image" or "image_path", "rank"};
            the same, a prompt a row: lists in "image" and "rank";
            HPDv2: {"prompt", "image_path": [images], "rank": [least is best]} of its test.json, and {"prompt",
            "file_path" or "image_path": [two images], "human_preference": [1 for the preferred, 0]} of its train.json;
            pairs: {"prompt", "img_better", "img_worse"};
            Pick-a-Pic: {"caption", "jpg_0", "jpg_1", "label_0", "label_1"}, the labels 1 and 0, or 0.5 for a tie.
        image_size: S; images are preprocessed as for scoring, see `images.open_square`.
        shapes: for shapes sources, options of `ShapesGroups`: size (default 20,000), seed, images_per_prompt.
        split: of a source that has splits.
        images: the folder that paths are relative to; that of the file by default.
        cache: a folder that keeps the resized images, made if absent; None decodes them each time.
        image_rule: "shown" or "original", see `images`.

    Raises:
        DataError, MissingDataError: naming file and row; every path is looked up now.
    """
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        options = {"size": SHAPES_SIZE, **(shapes or {})}
        return ShapesGroups(captions=shapes_captions(source), image_size=image_size, **options)
    if shapes is not None:
        raise ValueError(f"shapes options are for shapes:train and shapes:held_out alone; the source is {source!r}")
    if images is not None and not Path(images).is_dir():
        raise missing_file(images, "folder of images")
    table = read_table(source, split)
    folder = table.folder if images is None else Path(images)
    groups = read_groups(table, folder)
    return Groups(groups, table.where, image_size, cache=cache, image_rule=image_rule)


def read_groups(table: Table, folder: Path | None) -> list[Group]:
    """Reads the groups of a table in one of the forms that `load_groups` names; folder: what paths are relative to.

    Raises:
        DataError, MissingDataError: as `load_groups`.
    """
    groups = _read_groups(table, folder)
    if not groups:
        raise DataError(f"{table.name}: no prompt has two images or more: there is nothing to compare")
    return groups


def _read_groups(table, folder):
    columns = table.columns() or []
    if "img_better" in columns:
        return _pair_groups(table, folder)
    if "jpg_0" in columns:
        return _pick_a_pic(table, folder)
    if "human_preference" in columns:
        return _listed_images(table, folder, "human_preference")
    if "generations" not in columns and ("rank" in columns or "image" in columns):
        one = isinstance(table.rows[0].get("rank"), list)
        return _listed_images(table, folder, "rank") if one else _imagereward_db(table, folder)
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    generations, rankings = column_values(table, "generations"), column_values(table, "ranking")
    groups = []
    for i, prompt in enumerate(prompts):
        where = table.where(i)
        _check_group(generations[i], rankings[i], where)
        paths = tuple(images.find_image(path, folder, where) for path in generations[i])
        groups.append(Group(str(table.rows[i].get("id", i)), prompt, paths, tuple(rankings[i]), i))
    return groups


def has_rankings(table: Table) -> bool:
    """Whether a table is in one of the forms that `load_groups` names, by its columns."""
    columns = set(table.columns() or ())
    if columns & {"generations", "ranking", "human_preference", "img_better", "jpg_0"}:
        return True
    return "rank" in columns and bool(columns & {"image", "image_path", "file_path"})


def _pair_groups(table, folder):
    """Reads rows of a better and a worse image."""
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    columns = ("img_better", "img_worse")
    pick_column(table, columns[1], (), "")
    return [
        Group(str(i), prompt, tuple(RowImage(table.rows, i, name, folder=folder) for name in columns), (1, 2), i)
        for i, prompt in enumerate(prompts)
    ]


def _pick_a_pic(table, folder):
    """Reads rows of Pick-a-Pic v2: label_0 is 1 if jpg_0 was preferred, 0 if jpg_1 was, 0.5 if neither.

    Rows that nobody labelled (has_label is False) are left out and counted.
    """
    prompts = check_texts(table, column_values(table, "caption"), "caption")
    columns = ("jpg_0", "jpg_1")
    for name in ("jpg_1", "label_0", "label_1"):
        pick_column(table, name, (), "")
    labels = [column_values(table, f"label_{k}") for k in range(2)]
    ranks = {(1, 0): (1, 2), (0, 1): (2, 1), (0.5, 0.5): (1, 1)}
    known = column_values(table, "has_label") if "has_label" in table.columns() else [True] * len(prompts)
    groups = []
    for i, prompt in enumerate(prompts):
        if known[i] is False:
            continue
        found = labels[0][i], labels[1][i]
        if found not in ranks:
            raise DataError(
                f"{table.where(i)}: label_0={found[0]!r} and label_1={found[1]!r}: expected 1 and 0, 0 and 1, or 0.5 "
                "twice for a tie"
            )
        paths = tuple(RowImage(table.rows, i, name, folder=folder) for name in columns)
        groups.append(Group(str(i), prompt, paths, ranks[found], i))
    if len(groups) < len(prompts):
        say(f"{table.name}: {len(prompts) - len(groups)} rows without a label are left out", file=sys.stderr)
    return groups


def _listed_images(table, folder, column):
    """Reads rows of a prompt with lists of images and of ranks from 0 or 1, or of 1 for the preferred image and 0.

    Rows of one prompt stay groups of their own: people ranked each by itself. Lone images are left out.
    """
    images_column = pick_column(table, None, ("image_path", "file_path", "image"), "the column of images")
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    listed, values = column_values(table, images_column), column_values(table, column)
    ids = column_values(table, "prompt_id") if "prompt_id" in table.columns() else row_names(table)
    groups = []
    for i, (prompt, names, ranks) in enumerate(zip(prompts, listed, values)):
        where = table.where(i)
        if not isinstance(names, list):
            raise DataError(f"{where}: {images_column!r} must be a list of images; got {names!r:.100}")
        if not isinstance(ranks, list) or len(ranks) != len(names) or not all(_is_count(rank) for rank in ranks):
            raise DataError(
                f"{where}: {column!r} must be a list of {len(names)} whole numbers, as many as images; got {ranks!r}"
            )
        if column == "human_preference":
            if not {0, 1}.issuperset(ranks):
                raise DataError(f"{where}: {column!r} must hold 1 for the preferred image and 0; got {ranks!r}")
            ranks = [2 - rank for rank in ranks]
        if len(ranks) < 2:
            continue
        ranking = tuple(rank + (min(ranks) == 0) for rank in ranks)
        paths = tuple(RowImage(table.rows, i, images_column, item, folder) for item in range(len(names)))
        if images_column != "image":  # names, few enough to be looked up now
            paths = tuple(path.read(where) for path in paths)
        groups.append(Group(str(ids[i]), prompt, paths, ranking, i))
    return groups


def _is_count(rank):
    return isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0


def _imagereward_db(table, folder):
    """Reads rows of ImageRewardDB, images with their rank. Lone images are left out."""
    column = pick_column(table, None, ("image", "image_path"), "the column of images")
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    ranks = column_values(table, pick_column(table, "rank", (), ""))
    ids = column_values(table, "prompt_id") if "prompt_id" in table.columns() else prompts
    members = {}
    for i, rank in enumerate(ranks):
        found = RowImage(table.rows, i, column, folder=folder), rank
        members.setdefault(str(ids[i]), (prompts[i], i, []))[2].append(found)
    groups = []
    for name, (prompt, row, found) in members.items():
        if len(found) < 2:
            continue
        paths, ranking = zip(*found, strict=True)
        _check_ranking(ranking, len(paths), table.where(row))
        if column == "image_path":  # there are few enough of them to be looked up now
            paths = tuple(path.read(table.where(path.index)) for path in paths)
        groups.append(Group(name, prompt, paths, ranking, row))
    return groups


class Groups:
    """Reads ranked groups of files by number; `groups` has their ids and paths."""

    def __init__(
        self,
        groups: list[Group],
        where: Callable[[int], str],
        image_size: int,
        *,
        cache: str | os.PathLike | None = None,
        image_rule: str = "shown",
    ):
        self.groups, self.where, self.image_size = groups, where, image_size
        self.image_rule = image_rule
        self.cache = None if cache is None else Path(cache)
        self.largest = max(len(group.paths) for group in groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, range(len(self.groups[index].paths)))

    def read(self, index: int, chosen: Iterable[int]) -> dict[str, Any]:
        """Reads a group with only the chosen of its images."""
        group, where = self.groups[index], self.where(self.groups[index].row)
        chosen = list(chosen)
        pixels = np.stack([self._image(group.paths[k], where) for k in chosen])
        return {
            "prompt": group.prompt,
            "images": pixels.astype(np.float32) / np.float32(255),
            "ranking": np.array([group.ranking[k] for k in chosen], np.int32),
        }

    def pairs(self) -> list[tuple[int, int, int]]:
        """Lists all pairs of different rank as (group, first, second)."""
        return ranked_pairs([group.ranking for group in self.groups])

    def _image(self, path, where):
        """Reads uint8 [S, S, 3], from the cache if it is there."""
        found = encoded(path, where)
        kept = self.cache and _cache_file(self.cache, found, self.image_size, self.image_rule)
        if kept and kept.is_file():
            return np.load(kept)
        pixels = images.open_square(found, self.image_size, where, self.image_rule)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f".{kept.name}.{os.getpid()}.partial.npy")
            np.save(partial, pixels)
            os.replace(partial, kept)
        return pixels


def ranked_pairs(rankings: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Lists all pairs of different rank as (group, first, second), first < second."""
    return [
        (index, *pair)
        for index, ranking in enumerate(rankings)
        for pair in itertools.combinations(range(len(ranking)), 2)
        if ranking[pair[0]] != ranking[pair[1]]
    ]


def _cache_file(folder, image, size, rule):
    """Names the file that keeps an image's pixels, by the image's content; None if it cannot be named.

    Files of earlier versions end otherwise: their pixels were read by other rules.
    """
    if isinstance(image, Path):
        status = image.stat()
        content = f"{image.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()
    elif isinstance(image, bytes):
        content = image
    else:
        return None
    digest = hashlib.sha256(content).hexdigest()
    return folder / digest[:2] / f"{digest[2:34]}-{size}-{rule}.npy"


class Pairs:
    """Lists all pairs of different rank as groups of two, each of which is read alone.

    Args:
        groups: a `Groups`, or a `ShapesGroups` (of which every pair has different ranks).
    """

    largest = 2

    def __init__(self, groups: Groups | ShapesGroups):
        self.groups = groups
        if isinstance(groups, Groups):
            self.index = np.array(groups.pairs(), np.int32).reshape(-1, 3)
        else:
            inside = list(itertools.combinations(range(groups.images_per_prompt), 2))
            self.index = np.array([(i, *pair) for i in range(len(groups)) for pair in inside], np.int32)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, *chosen = self.index[index].tolist()
        if isinstance(self.groups, Groups):
            return self.groups.read(group, chosen)
        item = self.groups[group]
        return {"prompt": item["prompt"], "images": item["images"][chosen], "ranking": item["ranking"][chosen]}


def padded(item: dict[str, Any], size: int) -> dict[str, Any]:
    """Pads a group to `size` images: those added are black and have rank 0, which counts in no pair."""
    missing = size - len(item["ranking"])
    images = np.pad(item["images"], [(0, missing), (0, 0), (0, 0), (0, 0)])
    return {**item, "images": images, "ranking": np.pad(item["ranking"], (0, missing))}


def _check_group(generations, ranking, where):
    if not isinstance(generations, list) or len(generations) < 2:
        raise DataError(f"{where}: 'generations' must be a list of two or more images; got {generations!r}")
    _check_ranking(ranking, len(generations), where)


def _check_ranking(ranking, count, where):
    if not isinstance(ranking, (list, tuple)) or len(ranking) != count:
        raise DataError(f"{where}: 'ranking' must be a list of {count} ranks, as many as images; got {ranking!r}")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranking):
        raise DataError(f"{where}: 'ranking' must hold whole numbers from 1 (the best) up; got {list(ranking)!r}")
