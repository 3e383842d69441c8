"""Pairs of images of one prompt of which people prefer one, for training generators (DPO).

Resized for the VAE (`images.fit_and_locate`), not as reward models see images.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.data import images as image_files
from imagereward_jax.data.errors import DataError, missing_file
from imagereward_jax.data.groups import Group, encoded, ranked_pairs, read_groups
from imagereward_jax.data.pairs import IMAGE_COLUMNS, read_pairs_table
from imagereward_jax.data.prompts import PROMPT_COLUMNS, SHAPES_PREFIX, shapes_captions
from imagereward_jax.data.shapes.sources import ShapesGroups
from imagereward_jax.data.tables import Table, check_texts, column_values, pick_column, read_table

CHOSEN, REJECTED = "chosen", "rejected"


def load_preferences(
    source: str | os.PathLike,
    *,
    image_size: int,
    split: str = "train",
    images: str | os.PathLike | None = None,
    crop: str = "center",
    flip: bool = False,
    shapes: dict[str, Any] | None = None,
) -> "Preferences | ShapesPreferences":
    """Loads pairs of images: item i is {"prompt": str, "image": float32 [2, S, S, 3] in [0, 1]}, the preferred first.

    Args:
        source: ranked groups in a form that `groups.load_groups` reads (Pick-a-Pic, ImageRewardDB, ...), of which every
            pair of different rank counts; a folder with folders chosen/ and rejected/ of images of the same names, and
            captions in chosen/ as for `pairs.load_pairs`; or "shapes:train".
        image_size: S; the shorter side is resized to it, then the image is cropped.
        split: of a source that has splits. images: the folder that paths are relative to; that of the file by default.
        crop: "center" or "random". flip: mirror half of the images, each by itself. Both draw from the generator given
            to `fetch`.
        shapes: for shapes sources, options of `ShapesGroups`: size, seed, images_per_prompt; of each group the best and
            the worst image are a pair.

    Raises:
        DataError: broken rows, no pair of different rank; MissingDataError: a file is not there; both name file and
            row.
    """
    source = str(source)
    if source.startswith(SHAPES_PREFIX):
        return ShapesPreferences(
            ShapesGroups(captions=shapes_captions(source), image_size=image_size, **(shapes or {}))
        )
    folder = Path(os.path.expanduser(source))
    if (folder / CHOSEN).is_dir():
        table, groups = _read_folders(folder)
    else:
        if images is not None and not Path(images).is_dir():
            raise missing_file(images, "folder of images")
        table = read_table(source, split)
        groups = read_groups(table, table.folder if images is None else Path(images))
    return Preferences(table, groups, image_size=image_size, crop=crop, flip=flip)


def _read_folders(folder):
    """(table, groups) of chosen/NAME and rejected/NAME, of any suffix."""
    table = read_pairs_table(folder / CHOSEN)
    paths = column_values(table, pick_column(table, None, IMAGE_COLUMNS, ""))
    prompts = check_texts(table, column_values(table, pick_column(table, None, PROMPT_COLUMNS, "")), "caption")
    if not (folder / REJECTED).is_dir():
        raise missing_file(folder / REJECTED, "folder of images")
    rejected = folder / REJECTED
    others = {path.relative_to(rejected).with_suffix(""): path for path in image_files.list_images(rejected)}
    groups = []
    for i, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        chosen = image_files.find_image(path, table.folder, table.where(i))
        name = chosen.relative_to(folder / CHOSEN).with_suffix("")
        if name not in others:
            raise DataError(f"{table.where(i)}: {folder / REJECTED} has no image {name} beside {chosen}")
        groups.append(Group(str(name), prompt, (chosen, others[name]), (1, 2), i))
    return table, groups


class _Pairs:
    """Pairs of different rank; `ties` is how many pairs of equal rank were left out."""

    def __init__(self, name: str, rankings: Sequence[Sequence[int]]):
        self.index = np.array(ranked_pairs(rankings), np.int32).reshape(-1, 3)
        self.ties = sum(len(ranking) * (len(ranking) - 1) // 2 for ranking in rankings) - len(self.index)
        if not len(self.index):
            raise DataError(f"{name}: all of {self.ties} pairs are ties: there is no preference")

    def __len__(self) -> int:
        return len(self.index)

    def ordered(self, index: int, ranking: Sequence[int]) -> tuple[int, int]:
        """Which two images of the group are pair `index`, the preferred first."""
        first, second = self.index[index, 1:].tolist()
        return (first, second) if ranking[first] < ranking[second] else (second, first)


class Preferences(_Pairs):
    """Reads preferences of files by number; see `load_preferences`."""

    def __init__(self, table: Table, groups: list[Group], *, image_size: int, crop: str, flip: bool):
        self.rankings = [group.ranking for group in groups]
        super().__init__(table.name, self.rankings)
        self.table, self.groups = table, groups
        self.image_size, self.crop, self.flip = image_size, crop, flip

    @property
    def prompts(self) -> list[str]:
        """The prompt of each pair."""
        return [self.groups[group].prompt for group in self.index[:, 0]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a pair, both images cropped at the centre and not mirrored."""
        return self._item(index)

    def fetch(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Reads a pair with the crops and mirrorings that were asked for, drawn from `rng` for each image."""
        return self._item(index, crop=self.crop, flip=self.flip, rng=rng)

    def _item(self, index, **options):
        group = self.groups[self.index[index, 0]]
        where = self.table.where(group.row)
        found = []
        for chosen in self.ordered(index, group.ranking):
            image = image_files.open_image(encoded(group.paths[chosen], where), where)
            found.append(image_files.fit_and_locate(image, self.image_size, **options)[0])
        return {"prompt": group.prompt, "image": np.stack(found)}


class ShapesPreferences:
    """The best and the worst image of each of the shapes world's groups."""

    ties = 0

    def __init__(self, groups: ShapesGroups):
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.groups[index]
        order = np.argsort(item["ranking"], kind="stable")
        return {"prompt": item["prompt"], "image": item["images"][order[[0, -1]]]}
