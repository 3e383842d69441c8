"""The update of one layer in an adapter: LoRA, and LyCORIS's LoHa, LoKr and full differences, each also as DoRA.

Arrays are laid out as in PyTorch: [out, in] or [out, in, height, width].
"""

import math
from typing import Any, NamedTuple

import numpy as np

from imagereward_jax.weights.stability_names import Origin


class LowRank(NamedTuple):
    """LoRA: `scale * up @ down`, with a core between the two if it was decomposed by Tucker's form.

    Attributes:
        down: [rank, in, ...]. up: [out, rank, ...]. core: [rank, rank, height, width]; down and up are then 1x1.
        magnitude: DoRA's lengths of the rows, [out] (or of the columns, [1, in, ...]); None for plain LoRA.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float
    core: np.ndarray | None = None
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def kind(self) -> str:
        """The name of the format."""
        return "DoRA" if self.magnitude is not None else "LoRA"

    def delta(self) -> np.ndarray:
        """The update of the layer's PyTorch weight, float32 [out, in, ...], before DoRA's scaling."""
        down, up = (np.asarray(array, np.float32) for array in (self.down, self.up))
        if self.core is not None:
            product = _tucker(self.core, up.reshape(up.shape[:2]).T, down.reshape(down.shape[:2]))
            return np.float32(self.scale) * product
        product = up.reshape(up.shape[0], self.rank) @ down.reshape(self.rank, -1)
        return np.float32(self.scale) * product.reshape(up.shape[0], *down.shape[1:])


class Factors(NamedTuple):
    """An update of LyCORIS. tensors: by the names of its files. shape: of the layer's weight in the file.

    origin: which of the rows are the layer's, as for a checkpoint.
    """

    kind: str
    tensors: dict[str, np.ndarray]
    scale: float
    shape: tuple[int, ...]
    origin: Origin | None = None
    magnitude: np.ndarray | None = None

    def delta(self) -> np.ndarray:
        """As for `LowRank`.

        Raises:
            KeyError, ValueError: a factor is absent, or the product has another shape than the layer.
        """
        tensors = {name: np.asarray(array, np.float32) for name, array in self.tensors.items()}
        whole = np.float32(self.scale) * _PRODUCTS[self.kind](tensors)
        if whole.size != math.prod(self.shape):
            raise ValueError(f"{self.kind}: a product of {list(whole.shape)} is no update of {list(self.shape)}")
        whole = whole.reshape(self.shape)
        return whole if self.origin is None else self.origin.rows(whole)


Update = LowRank | Factors


def change(update: Update, weight: np.ndarray) -> np.ndarray:
    """How an adapter of weight 1 changes a layer's weight (float32, PyTorch's layout).

    DoRA (arXiv 2402.09353) gives each row of weight + update the length that it learnt.
    """
    delta = update.delta()
    if update.magnitude is None:
        return delta
    merged, magnitude = weight + delta, np.asarray(update.magnitude, np.float32)
    by_row = magnitude.ndim == 1
    axes = tuple(axis for axis in range(merged.ndim) if axis != (0 if by_row else 1))
    lengths = np.sqrt(np.square(merged).sum(axes, keepdims=True))
    return merged * (magnitude.reshape(lengths.shape) / lengths) - weight


def _tucker(core, up, down):
    """[out, in, ...] from the core [a, b, ...], up [a, out] and down [b, in]."""
    return np.einsum("ab...,ao,bi->oi...", np.asarray(core, np.float32), up, down)


def _loha(tensors):
    """Hadamard product of two low-rank products (arXiv 2108.06098)."""

    def half(number):
        one, other = tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"]
        core = tensors.get(f"hada_t{number}")
        return one @ other if core is None else _tucker(core, one, other)

    return half(1) * half(2)


def _lokr(tensors):
    """Kronecker product of two matrices, each perhaps of low rank."""

    def factor(number):
        if f"lokr_w{number}" in tensors:
            return tensors[f"lokr_w{number}"]
        one, other = tensors[f"lokr_w{number}_a"], tensors[f"lokr_w{number}_b"]
        core = tensors.get(f"lokr_t{number}")
        return one @ other.reshape(len(other), -1) if core is None else _tucker(core, one, other)

    first, second = factor(1), factor(2)
    return np.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)


_PRODUCTS: dict[str, Any] = {"LoHa": _loha, "LoKr": _lokr, "full difference": lambda tensors: tensors["diff"]}


def lycoris_rank(tensors: dict[str, np.ndarray]) -> int | None:
    """The rank that a LyCORIS update's alpha is divided by; None if nothing is of low rank: its scale is 1."""
    for name in ("lokr_w1_b", "lokr_w2_b", "hada_w1_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return None
