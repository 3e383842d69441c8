"""Agreement of scores with human rankings, as in the ImageReward paper (arXiv 2304.05977, tables 1 and 3).

Every function that counts does so for one prompt and returns (hits, cases), so that prompts can be added up and
resampled. A rank of 1 is best; equal ranks are ties; a rank of None or NaN means that nobody ranked the image.
"""

from collections.abc import Sequence

import numpy as np

Ranks = Sequence[float | None] | np.ndarray


def known_ranks(ranks: Ranks) -> np.ndarray:
    """float64 [K]; NaN where there is no rank."""
    return np.array([np.nan if rank is None else rank for rank in ranks], np.float64)


def preference_counts(ranks: Ranks, scores: Ranks) -> tuple[int, int]:
    """Pairs of one prompt's images that the scores order as people did.

    Args:
        ranks: [K], 1 is best. Pairs of equal rank, or with an unranked image, are no cases.
        scores: [K]. Equal scores, and scores that are not numbers, count as wrong.

    Returns:
        (right, pairs).

    Raises:
        ValueError: different lengths.
    """
    ranks, scores = _aligned(ranks, scores)
    better = ranks[:, None] < ranks[None, :]  # False with a NaN
    return int((better & (scores[:, None] > scores[None, :])).sum()), int(better.sum())


def recall_counts(ranks: Ranks, scores: Ranks, k: int) -> tuple[int, int]:
    """Whether an image that people rank best is among the k with the highest scores.

    Of equal scores the worst order is assumed, so that a constant scores nothing. A prompt is a case if more than k
    of its images are ranked, and not all the same.

    Returns:
        (1 or 0, 1 if the prompt is a case else 0).
    """
    return _selection(*_aligned(ranks, scores), k)


def filter_counts(ranks: Ranks, scores: Ranks, k: int) -> tuple[int, int]:
    """Whether an image that people rank worst is among the k with the lowest scores; see `recall_counts`."""
    ranks, scores = _aligned(ranks, scores)
    return _selection(-ranks, -scores, k)


def average_ranks(values: Ranks) -> np.ndarray:
    """Ranks from 1 for the smallest; ties share the mean of theirs. float64 [N]."""
    _, group, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def spearman(a: Ranks, b: Ranks) -> float:
    """Spearman's rank correlation, ties by average ranks; NaN where one side is constant or shorter than two.

    Raises:
        ValueError: different lengths.
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
    """(hit, case) for the images of the lowest rank among the k of the highest score."""
    ranked = ~np.isnan(ranks)
    ranks, scores = ranks[ranked], scores[ranked]
    if len(ranks) <= k or (ranks == ranks[0]).all():
        return 0, 0
    scores = np.where(np.isnan(scores), -np.inf, scores)
    wanted = ranks == ranks.min()
    before = (scores[~wanted] >= scores[wanted].max()).sum()
    return int(before < k), 1
