"""The metrics against counting by hand, loops from scratch, SciPy, and the binomial distribution."""

import itertools

import numpy as np
import pytest
from scipy import stats

from imagereward_jax.agreement import bootstrap, metrics, summary
from imagereward_jax.agreement.sources import RankedPrompt

GAP = None  # nobody ranked this image


# Counted by hand: (ranks, scores, (right, pairs)).
PAIRS = {
    "as people": ([1, 2, 3], [3.0, 2.0, 1.0], (3, 3)),
    "the other way round": ([1, 2, 3], [1.0, 2.0, 3.0], (0, 3)),
    "tie of people is no pair": ([1, 1, 2], [0.0, 5.0, 1.0], (1, 2)),
    "tie of scores is wrong": ([1, 2, 3], [1.0, 1.0, 0.0], (2, 3)),
    "constant scores": ([1, 2, 3], [0.0, 0.0, 0.0], (0, 3)),
    "ranks that skip": ([1, 5, 3], [3.0, 1.0, 2.0], (3, 3)),
    "ranks that do not start at 1": ([4, 2], [0.0, 1.0], (1, 1)),
    "unranked image": ([2, GAP, 1], [0.0, 9.0, 1.0], (1, 1)),
    "all the same": ([2, 2, 2], [1.0, 2.0, 3.0], (0, 0)),
    "single image": ([1], [0.5], (0, 0)),
    "nothing ranked": ([GAP, GAP], [0.5, 0.1], (0, 0)),
    "score that is not a number": ([1, 2, 3], [float("nan"), 2.0, 1.0], (1, 3)),
}
# (ranks, scores, k, recall (hit, case), filter (hit, case))
SELECTIONS = {
    "best and worst found": ([1, 2, 3], [3.0, 2.0, 1.0], 1, (1, 1), (1, 1)),
    "best second, worst second": ([1, 2, 3, 4], [3.0, 4.0, 1.0, 2.0], 1, (0, 1), (0, 1)),
    "found within two": ([1, 2, 3, 4], [3.0, 4.0, 1.0, 2.0], 2, (1, 1), (1, 1)),
    "either of two best will do": ([1, 1, 2, 3], [0.0, 9.0, 5.0, 6.0], 1, (1, 1), (0, 1)),
    "best ties with another: the worst order": ([1, 2, 3], [1.0, 1.0, 0.0], 1, (0, 1), (1, 1)),
    "two best tie with each other": ([1, 1, 3], [1.0, 1.0, 0.0], 1, (1, 1), (1, 1)),
    "constant scores": ([1, 2, 3, 4], [0.0] * 4, 2, (0, 1), (0, 1)),
    "too few images for k": ([1, 2], [1.0, 0.0], 2, (0, 0), (0, 0)),
    "unranked images do not count": ([1, GAP, 2], [1.0, 9.0, 0.0], 1, (1, 1), (1, 1)),
    "too few ranked for k": ([1, GAP, 2], [1.0, 9.0, 0.0], 2, (0, 0), (0, 0)),
    "all the same": ([3, 3, 3], [1.0, 2.0, 3.0], 1, (0, 0), (0, 0)),
    "single image": ([1], [1.0], 1, (0, 0), (0, 0)),
    "score that is not a number: last either way": ([1, 2, 3], [float("nan"), 2.0, 1.0], 1, (0, 1), (1, 1)),
    "worst has no score: not found": ([1, 2, 3], [3.0, 2.0, float("nan")], 1, (1, 1), (0, 1)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_counted_by_hand(case):
    ranks, scores, expected = PAIRS[case]
    assert metrics.preference_counts(ranks, scores) == expected


@pytest.mark.parametrize("case", SELECTIONS)
def test_selections_counted_by_hand(case):
    ranks, scores, k, recall, filtered = SELECTIONS[case]
    assert metrics.recall_counts(ranks, scores, k) == recall
    assert metrics.filter_counts(ranks, scores, k) == filtered


def count_pairs(ranks, scores):
    """Every pair looked at in turn."""
    right = pairs = 0
    for a, b in itertools.permutations(range(len(ranks)), 2):
        if ranks[a] is not None and ranks[b] is not None and ranks[a] < ranks[b]:
            pairs += 1
            right += scores[a] > scores[b]
    return right, pairs


def found_in_every_order(ranks, scores, k, wanted, highest_first):
    """Whether, however ties of the scores are broken, one of the `wanted` is among the first k."""
    known = [i for i, rank in enumerate(ranks) if rank is not None]
    sign = -1 if highest_first else 1
    orders = [
        order
        for order in itertools.permutations(known)
        if all(sign * scores[a] <= sign * scores[b] for a, b in itertools.pairwise(order))
    ]
    return all(any(i in wanted for i in order[:k]) for order in orders)


def random_rankings(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        size = int(rng.integers(1, 7))
        ranks = [None if rng.random() < 0.15 else int(rank) for rank in rng.integers(1, 5, size)]
        yield ranks, rng.integers(0, 4, size).astype(float).tolist()  # few values: many ties


def test_random_rankings_with_ties_gaps_and_single_images_against_loops():
    for ranks, scores in random_rankings(150):
        assert metrics.preference_counts(ranks, scores) == count_pairs(ranks, scores)
        known = [rank for rank in ranks if rank is not None]
        for k in (1, 2, 4):
            case = int(len(known) > k and len(set(known)) > 1)
            best = [i for i, rank in enumerate(ranks) if known and rank == min(known)]
            worst = [i for i, rank in enumerate(ranks) if known and rank == max(known)]
            recall = int(bool(case) and found_in_every_order(ranks, scores, k, best, True))
            filtered = int(bool(case) and found_in_every_order(ranks, scores, k, worst, False))
            assert metrics.recall_counts(ranks, scores, k) == (recall, case), (ranks, scores, k)
            assert metrics.filter_counts(ranks, scores, k) == (filtered, case), (ranks, scores, k)


def test_accuracy_adds_up_pairs_over_prompts():
    """(3 + 1 + 0 right) of (3 + 2 + 3 pairs); a mean of the prompts' shares would be 0.5."""
    rows = [PAIRS[name] for name in ("as people", "tie of people is no pair", "constant scores", "single image")]
    groups = [RankedPrompt(str(i), "a cat", (None,) * len(ranks), ranks) for i, (ranks, _, _) in enumerate(rows)]
    results = summary.agreement(groups, [scores for _, scores, _ in rows], ks=(1,), resamples=10)
    assert results["accuracy"].value == 4 / 8 and results["accuracy"].cases == 8
    assert results["recall@1"].cases == 3


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(1)
    for size in (2, 3, 6, 20):
        for _ in range(20):
            a, b = rng.integers(0, max(3, size // 2), (2, size))
            if len(set(a)) > 1 and len(set(b)) > 1:
                np.testing.assert_allclose(metrics.spearman(a, b), stats.spearmanr(a, b).statistic, atol=1e-12)
    assert np.isnan(metrics.spearman([1, 1, 1], [1, 2, 3])) and np.isnan(metrics.spearman([1], [1]))


def test_the_published_means_have_the_published_rho():
    """Table 1's ImageReward means order the six generators as people do: rho 1.00; swapped neighbours: 1 - 6*2/210."""
    means = {
        "openjourney": 0.2614,
        "sd2-1": 0.2458,
        "dalle2": 0.2114,
        "sd1-4": 0.1344,
        "vd": -0.2470,
        "cogview2": -1.2376,
    }
    scores = {name: np.full((5, 10), mean) for name, mean in means.items()}
    found, rho = summary.generator_means(scores, human_order=list(summary.PUBLISHED_ORDER), resamples=50)
    assert rho[:3] == (1.0, 1.0, 1.0)
    assert {name: round(estimate.value, 4) for name, estimate in found.items()} == means
    swapped = ["sd2-1", "openjourney", *summary.PUBLISHED_ORDER[2:]]
    _, rho = summary.generator_means(scores, human_order=swapped, resamples=50)
    np.testing.assert_allclose(rho.value, 1 - 12 / 210)


def test_the_interval_is_that_of_the_binomial_distribution():
    """400 prompts of one pair each, 300 right: 95 % within 0.005 of 0.75 +- 1.96 standard errors."""
    weights = bootstrap.resample_weights(400, 4000, seed=3)
    estimate = bootstrap.ratio([1] * 300 + [0] * 100, [1] * 400, weights)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert estimate.value == 0.75
    np.testing.assert_allclose([estimate.low, estimate.high], [0.75 - half, 0.75 + half], atol=0.005)


def test_prompts_are_resampled_not_pairs():
    """Pairs of a prompt that go right or wrong together widen the interval as if there were fewer of them."""
    weights = bootstrap.resample_weights(100, 4000, seed=3)
    hits = np.repeat([10, 0], 50)
    estimate = bootstrap.ratio(hits, [10] * 100, weights)
    np.testing.assert_allclose(estimate.high - estimate.low, 2 * 1.96 * 0.05, rtol=0.1)


def test_same_seed_same_interval():
    groups = [RankedPrompt(str(i), "a cat", (None,) * 2, (1, 2)) for i in range(20)]
    scores = np.random.default_rng(0).random((20, 2)).tolist()
    first, again, other = (summary.agreement(groups, scores, ks=(1,), seed=seed) for seed in (0, 0, 1))
    assert first == again and first["accuracy"] != other["accuracy"]


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="as many scores as ranks"):
        metrics.preference_counts([1, 2, 3], [0.0, 1.0])
