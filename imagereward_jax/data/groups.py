"""Ranked groups of pictures: what people prefer, for training and judging reward models."""

from typing import NamedTuple

import numpy as np

from imagereward_jax.data import pictures
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.prompts import SHAPES_PREFIX, shapes_captions
from imagereward_jax.data.shapes_sources import ShapesGroups
from imagereward_jax.data.tables import check_texts, column_values, read_table

SHAPES_SIZE = 20_000


class Group(NamedTuple):
    """One prompt with its pictures: paths [K] and ranks [K], 1 is best; equal ranks are ties."""

    id: str
    prompt: str
    paths: tuple
    ranking: tuple


def load_groups(source, *, image_size=224, shapes=None):
    """Ranked groups: item i is {"prompt": str, "images": float32 [K, S, S, 3], "ranking": int32 [K], 1 is best}.

    Args:
        source: a .json or .jsonl of {"id", "prompt", "generations": [paths], "ranking": [1 is best]}, as ImageReward
            publishes its test set (paths are relative to the file); "shapes:train" or "shapes:held_out".
        image_size: S; the shorter side is resized to it, then the center is cut out.
        shapes: for shapes sources, options of `ShapesGroups`: size (default 20,000), seed, images_per_prompt.
    Raises:
        DataError, MissingDataError: naming file and row; every path is looked up now.
    """
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        options = {"size": SHAPES_SIZE, **(shapes or {})}
        return ShapesGroups(captions=shapes_captions(source), image_size=image_size, **options)
    if shapes is not None:
        raise ValueError(f"shapes options are for shapes:train and shapes:held_out alone; the source is {source!r}")
    table = read_table(source)
    prompts = check_texts(table, column_values(table, "prompt"), "prompt")
    generations, rankings = column_values(table, "generations"), column_values(table, "ranking")
    groups = []
    for i, prompt in enumerate(prompts):
        where = table.where(i)
        _check_group(generations[i], rankings[i], where)
        paths = tuple(pictures.find_picture(path, table.folder, where) for path in generations[i])
        groups.append(Group(str(table.rows[i].get("id", i)), prompt, paths, tuple(rankings[i])))
    return Groups(groups, table.where, image_size)


class Groups:
    """Random access to ranked groups of files; `groups` has their ids and paths."""

    def __init__(self, groups, where, image_size):
        self.groups, self.where, self.image_size = groups, where, image_size

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        group, where = self.groups[index], self.where(index)
        images = [pictures.fit(pictures.open_picture(path, where), self.image_size) for path in group.paths]
        return {"prompt": group.prompt, "images": np.stack(images), "ranking": np.array(group.ranking, np.int32)}


def _check_group(generations, ranking, where):
    if not isinstance(generations, list) or len(generations) < 2:
        raise DataError(f"{where}: 'generations' must be a list of two or more pictures; got {generations!r}")
    if not isinstance(ranking, list) or len(ranking) != len(generations):
        raise DataError(
            f"{where}: 'ranking' must be a list of {len(generations)} ranks, as many as pictures; got {ranking!r}"
        )
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranking):
        raise DataError(f"{where}: 'ranking' must hold whole numbers from 1 (the best) up; got {ranking!r}")
