"""Embeddings of the images evaluated before the first step; drift is the distance of later ones from them."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.storage.files import save_arrays

FILE = "base_embeddings.npz"
SETTINGS = "settings"
# Fields of config.eval that do not change the images.
IGNORED = ("every", "best", "grid", "guidance_scales", "batch_size")


class Baseline:
    """WORKDIR/base_embeddings.npz: unit vectors of the images, and the fields of config.eval that made them.

    Args:
        workdir: of the run. config: of the assembled run.
        main: whether this process writes the file; all read it.

    Attributes:
        outdated: why its images have to be sampled again; "" if they need not.
    """

    def __init__(self, workdir: Path, config: Any, *, main: bool):
        self.path, self.main = workdir / FILE, main
        settings = json.loads(config.eval.to_json())
        self._settings = json.dumps({name: value for name, value in settings.items() if name not in IGNORED})
        self._embeds, self.outdated = None, ""
        if not self.path.exists():
            return
        try:
            with np.load(self.path) as file:
                there = {name: file[name] for name in file.files}
            if str(there.pop(SETTINGS)) != self._settings:
                self.outdated = "config.eval has changed"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            self.outdated = f"{self.path} is damaged"
        if not self.outdated:
            self._embeds = there

    def keep(self, embeds: Mapping[str, np.ndarray]) -> None:
        """Stores the embeddings of the evaluation before the first step; see `methods.base.Evaluation.embeds`."""
        self._embeds, self.outdated = dict(embeds), ""
        if self.main and embeds:
            save_arrays(self.path, {SETTINGS: np.array(self._settings), **embeds})

    def drift(self, embeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean distances (1 - cosine, in [0, 2]) from the stored embeddings, by name; others are left out."""
        kept = self._embeds or {}
        return {name: _distance(now, kept[name]) for name, now in embeds.items() if name in kept}


def _distance(one, other):
    """For unit vectors half the squared difference, which is exactly 0 of equal ones."""
    return float(0.5 * np.square(one.astype(np.float64) - other).sum(-1).mean())
