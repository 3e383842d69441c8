"""Computes the numbers of tables 1 and 3 from the scores of every image."""

from collections.abc import Sequence

import numpy as np

from imagereward_jax.agreement import bootstrap, metrics
from imagereward_jax.agreement.sources import RankedPrompt

KS = (1, 2, 4)
# Human order of table 1, best first, by the folder names of the original repository.
PUBLISHED_ORDER = ("openjourney", "sd2-1", "dalle2", "sd1-4", "vd", "cogview2")


def agreement(
    groups: Sequence[RankedPrompt],
    scores: Sequence[Sequence[float]],
    *,
    ks: Sequence[int] = KS,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, bootstrap.Estimate]:
    """Computes table 3 for one model.

    Args:
        groups: P `RankedPrompt`s.
        scores: list of P lists, the score of every image.
        ks: the k of recall@k and filter@k.

    Returns:
        {"accuracy", "recall@1", ..., "filter@1", ...: Estimate}.
    """
    weights = bootstrap.resample_weights(len(groups), resamples, seed)
    counters = {"accuracy": metrics.preference_counts}
    for name, count in (("recall", metrics.recall_counts), ("filter", metrics.filter_counts)):
        counters |= {f"{name}@{k}": _at(count, k) for k in ks}
    results = {}
    for name, count in counters.items():
        counts = np.array([count(group.ranks, row) for group, row in zip(groups, scores)])
        results[name] = bootstrap.ratio(counts[:, 0], counts[:, 1], weights, level)
    return results


def _at(count, k):
    return lambda ranks, scores: count(ranks, scores, k)


def disagreement(groups: Sequence[RankedPrompt], scores_of_models: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Computes the share of wrongly ordered pairs per prompt [P], mean over models.

    NaN for prompts without a pair. `scores_of_models` has the `scores` of `agreement` per model.
    """
    shares = []
    for scores in scores_of_models:
        counts = np.array([metrics.preference_counts(g.ranks, row) for g, row in zip(groups, scores)], np.float64)
        pairs = np.where(counts[:, 1] > 0, counts[:, 1], np.nan)
        shares.append(1 - counts[:, 0] / pairs)
    return np.mean(shares, axis=0)


def generator_means(
    scores: dict[str, np.ndarray],
    *,
    human_order: Sequence[str] | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, bootstrap.Estimate], bootstrap.Estimate | None]:
    """Computes table 1 for one model.

    Args:
        scores: {generator: [P, K] the score of every image}; equally many prompts for each.
        human_order: the generators from the best to the worst, or None if unknown.

    Returns:
        ({generator: Estimate of the mean over prompts of a prompt's mean}, Spearman's rho to the human order as an
        `Estimate`, or None).
    """
    prompt_means = {name: np.asarray(rows, np.float64).mean(axis=1) for name, rows in scores.items()}
    count = len(next(iter(prompt_means.values())))
    weights = bootstrap.resample_weights(count, resamples, seed)
    ones = np.ones(count)
    means = {name: bootstrap.ratio(values, ones, weights, level) for name, values in prompt_means.items()}
    if human_order is None:
        return means, None
    places = -np.arange(len(human_order))
    rho = metrics.spearman(places, [means[name].value for name in human_order])
    resampled = weights @ np.stack([prompt_means[name] for name in human_order], axis=1) / count
    samples = [metrics.spearman(places, row) for row in resampled]
    return means, bootstrap.Estimate(rho, *bootstrap.interval(samples, level), len(human_order))
