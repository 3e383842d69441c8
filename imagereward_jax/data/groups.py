"""Ranked groups of pictures: what people prefer, for training and judging reward models."""

import hashlib
import itertools
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.prompts import SHAPES_PREFIX, shapes_captions
from imagereward_jax.data.shapes.sources import ShapesGroups
from imagereward_jax.data.tables import check_texts, column_values, pick_column, read_table

SHAPES_SIZE = 20_000


class Group(NamedTuple):
    """One prompt with its pictures: paths [K] and ranks [K], 1 is best; equal ranks are ties.

    `paths` may also hold what else `images.open_picture` takes, and `RowPicture`s. `row`: where it was read.
    """

    id: str
    prompt: str
    paths: tuple
    ranking: tuple
    row: int = 0


class RowPicture(NamedTuple):
    """A picture that stays in its table until it is needed: data sets of pictures do not fit in memory."""

    rows: Any
    index: int
    column: str
    item: int | None = None

    def read(self, folder, where):
        """What `images.open_picture` takes."""
        value = self.rows[self.index][self.column]
        return images.find_picture(value if self.item is None else value[self.item], folder, where)


def load_groups(source, *, image_size=224, shapes=None, split="train", images=None, cache=None):
    """Ranked groups: item i is {"prompt": str, "images": float32 [K, S, S, 3], "ranking": int32 [K], 1 is best}.

    Args:
        source: "shapes:train" or "shapes:held_out"; or a table (.json, .jsonl, .parquet, a folder saved by `datasets`,
            a hub name) in one of these forms:
            {"prompt", "generations": [pictures], "ranking": [1 is best]}, as ImageReward publishes its test set and
            its training code reads;
            ImageRewardDB, one picture a row: {"prompt_id", "prompt", "image" or "image_path", "rank"};
            the same, a prompt a row: lists in "image" and "rank";
            pairs: {"prompt", "img_better", "img_worse"}.
        image_size: S; the shorter side is resized to it, then the center is cut out.
        shapes: for shapes sources, options of `ShapesGroups`: size (default 20,000), seed, images_per_prompt.
        split: of a source that has splits.
        images: the folder that paths are relative to; that of the file by default.
        cache: a folder that keeps the resized pictures, made if absent; None decodes them each time.
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
        raise missing_file(images, "folder of pictures")
    table = read_table(source, split)
    folder = table.folder if images is None else Path(images)
    groups = _read_groups(table, folder)
    if not groups:
        raise DataError(f"{table.name}: no prompt has two pictures or more: there is nothing to compare")
    return Groups(groups, table.where, image_size, folder=folder, cache=cache)


def _read_groups(table, folder):
    columns = table.columns() or []
    if "img_better" in columns:
        return _pair_groups(table)
    if "generations" not in columns and ("rank" in columns or "image" in columns):
        return _imagereward_db(table, folder)
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    generations, rankings = column_values(table, "generations"), column_values(table, "ranking")
    groups = []
    for i, prompt in enumerate(prompts):
        where = table.where(i)
        _check_group(generations[i], rankings[i], where)
        paths = tuple(images.find_picture(path, folder, where) for path in generations[i])
        groups.append(Group(str(table.rows[i].get("id", i)), prompt, paths, tuple(rankings[i]), i))
    return groups


def _pair_groups(table):
    """Rows of a better and a worse picture."""
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    columns = ("img_better", "img_worse")
    pick_column(table, columns[1], (), "")
    return [
        Group(str(i), prompt, tuple(RowPicture(table.rows, i, column) for column in columns), (1, 2), i)
        for i, prompt in enumerate(prompts)
    ]


def _imagereward_db(table, folder):
    """Rows of ImageRewardDB: pictures with their rank, or prompts with lists of both. Lone pictures are left out."""
    column = pick_column(table, None, ("image", "image_path"), "the column of pictures")
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    ranks = column_values(table, pick_column(table, "rank", (), ""))
    ids = column_values(table, "prompt_id") if "prompt_id" in table.columns() else prompts
    members = {}
    for i, rank in enumerate(ranks):
        if isinstance(rank, list):
            found = [(RowPicture(table.rows, i, column, item), r) for item, r in enumerate(rank)]
        else:
            found = [(RowPicture(table.rows, i, column), rank)]
        members.setdefault(str(ids[i]), (prompts[i], i, []))[2].extend(found)
    groups = []
    for name, (prompt, row, found) in members.items():
        if len(found) < 2:
            continue
        paths, ranking = zip(*found, strict=True)
        _check_ranking(ranking, len(paths), table.where(row))
        if column == "image_path":  # there are few enough of them to be looked up now
            paths = tuple(path.read(folder, table.where(path.index)) for path in paths)
        groups.append(Group(name, prompt, paths, ranking, row))
    return groups


class Groups:
    """Random access to ranked groups of files; `groups` has their ids and paths."""

    def __init__(self, groups, where, image_size, *, folder=None, cache=None):
        self.groups, self.where, self.image_size, self.folder = groups, where, image_size, folder
        self.cache = None if cache is None else Path(cache)
        self.largest = max(len(group.paths) for group in groups)

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        return self.read(index, range(len(self.groups[index].paths)))

    def read(self, index, chosen):
        """The group with the chosen of its pictures alone."""
        group, where = self.groups[index], self.where(self.groups[index].row)
        images = np.stack([self._picture(group.paths[k], where) for k in chosen])
        return {
            "prompt": group.prompt,
            "images": images.astype(np.float32) / np.float32(255),
            "ranking": np.array([group.ranking[k] for k in chosen], np.int32),
        }

    def pairs(self):
        """[(group, first, second)] of all pairs of different rank."""
        return [
            (index, *pair)
            for index, group in enumerate(self.groups)
            for pair in itertools.combinations(range(len(group.paths)), 2)
            if group.ranking[pair[0]] != group.ranking[pair[1]]
        ]

    def _picture(self, path, where):
        """uint8 [S, S, 3], from the cache where it is there."""
        picture = path.read(self.folder, where) if isinstance(path, RowPicture) else path
        kept = self.cache and _cache_file(self.cache, picture, self.image_size)
        if kept and kept.is_file():
            return np.load(kept)
        image = images.fit(images.open_picture(picture, where), self.image_size)
        image = np.round(image * 255).astype(np.uint8)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f".{kept.name}.{os.getpid()}.partial.npy")
            np.save(partial, image)
            os.replace(partial, kept)
        return image


def _cache_file(folder, picture, size):
    """Where a picture's pixels are kept: a name that changes with the file's content. None: it cannot be named."""
    if isinstance(picture, Path):
        status = picture.stat()
        content = f"{picture.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()
    elif isinstance(picture, bytes):
        content = picture
    else:
        return None
    digest = hashlib.sha256(content).hexdigest()
    return folder / digest[:2] / f"{digest[2:34]}-{size}.npy"


class Pairs:
    """All pairs of different rank, as groups of two: each of them is read alone.

    Args:
        groups: a `Groups`, or a `ShapesGroups` (of which every pair has different ranks).
    """

    largest = 2

    def __init__(self, groups):
        self.groups = groups
        if isinstance(groups, Groups):
            self.index = np.array(groups.pairs(), np.int32).reshape(-1, 3)
        else:
            inside = list(itertools.combinations(range(groups.images_per_prompt), 2))
            self.index = np.array([(i, *pair) for i in range(len(groups)) for pair in inside], np.int32)

    def __len__(self):
        return len(self.index)

    def __getitem__(self, index):
        group, *chosen = self.index[index].tolist()
        if isinstance(self.groups, Groups):
            return self.groups.read(group, chosen)
        item = self.groups[group]
        return {"prompt": item["prompt"], "images": item["images"][chosen], "ranking": item["ranking"][chosen]}


def padded(item, size):
    """The group made one of `size` pictures: what is added is black and has rank 0, which counts in no pair."""
    missing = size - len(item["ranking"])
    images = np.pad(item["images"], [(0, missing), (0, 0), (0, 0), (0, 0)])
    return {**item, "images": images, "ranking": np.pad(item["ranking"], (0, missing))}


def _check_group(generations, ranking, where):
    if not isinstance(generations, list) or len(generations) < 2:
        raise DataError(f"{where}: 'generations' must be a list of two or more pictures; got {generations!r}")
    _check_ranking(ranking, len(generations), where)


def _check_ranking(ranking, count, where):
    if not isinstance(ranking, (list, tuple)) or len(ranking) != count:
        raise DataError(f"{where}: 'ranking' must be a list of {count} ranks, as many as pictures; got {ranking!r}")
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranking):
        raise DataError(f"{where}: 'ranking' must hold whole numbers from 1 (the best) up; got {list(ranking)!r}")
