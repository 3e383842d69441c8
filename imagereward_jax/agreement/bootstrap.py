"""Percentile bootstrap over prompts, as the images of one prompt are not independent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over `cases` with its interval; NaN if there are no cases."""

    value: float
    low: float
    high: float
    cases: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns a dict for JSON: NaN becomes None."""
        return {name: None if isinstance(x, float) and np.isnan(x) else x for name, x in self._asdict().items()}


def resample_weights(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Draws the count of each prompt in each resample: int64 [resamples, prompts], equal for all models and metrics."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)


def ratio(
    hits: Sequence[float] | np.ndarray, cases: Sequence[float] | np.ndarray, weights: np.ndarray, level: float = 0.95
) -> Estimate:
    """Computes sum(hits) / sum(cases) with its interval.

    Args:
        hits, cases: [P], one entry per prompt.
        weights: [R, P] from `resample_weights`.
        level: share of the resamples within the interval.

    Returns:
        `Estimate`.
    """
    hits, cases = np.asarray(hits, np.float64), np.asarray(cases, np.float64)
    total = cases.sum()
    if total == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    below = weights @ cases
    samples = (weights @ hits)[below > 0] / below[below > 0]
    return Estimate(float(hits.sum() / total), *interval(samples, level), int(total))


def interval(samples: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Computes (low, high): quantiles around the central `level` of the samples; NaN if there are none."""
    samples = np.asarray(samples, np.float64)
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return float("nan"), float("nan")
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
