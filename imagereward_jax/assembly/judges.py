"""Scores and embeddings of evaluated images, by the reward that trains and by the judges that watch it.

Distances are 1 - cosine of embeddings: those of the first of config.eval.judges that is a network, else of the reward's
network, else the images' colours at 16 x 16 pixels; names of metrics then end in "_pixels".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from imagereward_jax.methods.base import Params
from imagereward_jax.rewards.mixed import Terms
from imagereward_jax.training.mesh import put_replicated_rows, replicated, weight_shardings

THUMBNAIL = 16


class BatchScorer:
    """Scores images by all terms of a reward, networks a batch at a time over the mesh, functions all at once.

    Args:
        terms: networks and functions.
        mesh: every process of it has to make the same calls.
        batch_size: images at a time over the whole mesh; rounded up to a multiple of its devices.
        embeds: whether images are embedded as well; needs `terms.embedder`.
    """

    def __init__(self, terms: Terms, mesh: Mesh, batch_size: int, *, embeds: bool = False):
        self.terms, self.networks, self.mesh, self.embeds = terms, terms.networks, mesh, embeds
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._apply = jax.jit(self._apply_batch, out_shardings=replicated(mesh))

    def place_params(self) -> Params:
        """The networks' weights on the mesh, from where the rewards hold them: for rewards that are no component."""
        params = {} if self.networks is None else self.networks.params
        return jax.device_put(params, weight_shardings(self.mesh, params))

    def __call__(
        self,
        params: Params,
        images: np.ndarray,
        pixels: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Scores N images.

        Args:
            params: those of the networks, on the mesh.
            images: float32 [N, H, W, 3] in [0, 1]. pixels: the same in uint8, for functions.
            metadata: the other columns of the prompts' rows, for functions.

        Returns:
            ({curve: scores [N]} of the terms and of named scores of functions, unit vectors [N, D] or None).

        Raises:
            RewardError: a function failed, or a term has no finite score.
        """
        scores, embeds = {}, None
        for name in self.terms.functions:
            scores |= self.terms.call_function(name, pixels, prompts, metadata)
        if self.networks is not None:
            found, embeds = self._by_networks(params, images, prompts)
            scores |= found
        self.terms.check_finite(scores)
        return scores, embeds

    def _by_networks(self, params, images, prompts):
        found = []
        for start in range(0, len(images), self.batch_size):
            rows = np.minimum(np.arange(start, start + self.batch_size), len(images) - 1)
            tokens = self.networks.tokenize([prompts[row] for row in rows])
            batch = put_replicated_rows(self.mesh, {"images": images[rows], "tokens": tokens})
            found.append(jax.device_get(self._apply(params, batch["images"], batch["tokens"])))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)

    def _apply_batch(self, params, images, tokens):
        embeds = self.terms.embed(params, images) if self.embeds else None
        return self.terms.apply_networks(params, images, tokens), embeds


def embed_pixels(pixels: np.ndarray) -> np.ndarray:
    """Embeds images uint8 [N, H, W, 3] by their colours at 16 x 16, 0 for mid-grey: unit vectors [N, 768] float32."""
    size = (THUMBNAIL, THUMBNAIL)
    small = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in pixels])
    colours = small.reshape(len(small), -1).astype(np.float32) - 127.5  # never 0: pixels are whole numbers
    return colours / np.linalg.norm(colours, axis=1, keepdims=True)


def distance_within(embeds: np.ndarray, count: int) -> np.ndarray:
    """Mean pairwise distance of the images of each prompt, [P] in [0, 2].

    Args:
        embeds: unit vectors [P * count, D], prompt by prompt. count: images of a prompt, at least 2.
    """
    sums = embeds.astype(np.float64).reshape(-1, count, embeds.shape[1]).sum(1)
    return 1 - (np.square(sums).sum(1) - count) / (count * (count - 1))


def over_prompts(values: np.ndarray, count: int) -> np.ndarray:
    """Means of the finite values [P * count] of each prompt; prompts without any are left out."""
    grouped = np.asarray(values, np.float32).reshape(-1, count)
    finite = np.isfinite(grouped)
    counts = finite.sum(1)
    return np.where(finite, grouped, 0).sum(1)[counts > 0] / counts[counts > 0]
