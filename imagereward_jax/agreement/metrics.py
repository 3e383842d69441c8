"""Agreement of scores with human rankings, as in the ImageReward paper (arXiv 2304.05977, tables 1 and 3).

The counting functions return (hits, cases) of one prompt, so that prompts can be summed and resampled.
A rank of 1 is best; equal ranks are ties; None or NaN marks an unranked image.
"""

from collections.abc import Sequence

import numpy as np

Ranks = Sequence[float | None] | np.ndarray


def known_ranks(ranks: Ranks) -> np.ndarray:
    """Converts ranks to float64 [K]; NaN if there is no rank."""
    return np.array([np.nan if rank is None else rank for rank in ranks], np.float64)


def preference_counts(ranks: Ranks, scores: Ranks) -> tuple[int, int]:
    """Counts the pairs of one prompt's images that the scores order as people did.

    Args:
        ranks: [K], 1 is best. Pairs of equal rank, or with an unranked image, are not counted.
        scores: [K]. Equal scores and NaN count as wrong.

    Returns:
        (right, pairs).

    Raises:
        ValueError: the lengths differ.
    """
    ranks, scores = _aligned(ranks, scores)
    better = ranks[:, None] < ranks[None, :]  # False with a NaN
    return int((better & (scores[:, None] > scores[None, :])).sum()), int(better.sum())


def recall_counts(ranks: Ranks, scores: Ranks, k: int) -> tuple[int, int]:
    """Whether an image that people rank best is among the k with the highest scores.

    Ties are broken against the scorer, so that constant scores get no hits. A prompt is a case if more than k of its
    images are ranked, with different ranks.

    Returns:
        (1 for a hit else 0, 1 for a case else 0).
    """
    return _selection(*_aligned(ranks, scores), k)


def filter_counts(ranks: Ranks, scores: Ranks, k: int) -> tuple[int, int]:
    """Whether an image that people rank worst is among the k with the lowest scores; see `recall_counts`."""
    ranks, scores = _aligned(ranks, scores)
    return _selection(-ranks, -scores, k)


def average_ranks(values: Ranks) -> np.ndarray:
    """Ranks values from 1 for the smallest; ties get their mean rank. Returns float64 [N]."""
    _, group, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def spearman(a: Ranks, b: Ranks) -> float:
    """Computes Spearman's rank correlation with average ranks for ties; NaN for constant or single values.

    Raises:
        ValueError: the lengths differ.
    """
    a, b = _aligned(a, b)
    if len(a) < 2 or np.isnan(a).any() or np.isnan(b).any():
        return float("nan")
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _aligned(a, b):
    a, b = known_ranks(a), known_ranks(b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected as many scores as ranks; got {b.shape} and {a.shape}")
    return a, b


def _selection(ranks, scores, k):
    """Returns (hit, case): whether an image of the lowest rank is among the k highest scores."""
    ranked = ~np.isnan(ranks)
    ranks, scores = ranks[ranked], scores[ranked]
    if len(ranks) <= k or (ranks == ranks[0]).all():
        return 0, 0
    scores = np.where(np.isnan(scores), -np.inf, scores)
    wanted = ranks == ranks.min()
    before = (scores[~wanted] >= scores[wanted].max()).sum()
    return int(before < k), 1
