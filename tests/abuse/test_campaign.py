"""Bad inputs by kind: every one is refused in clear words, or is taken; none is a traceback or over its limits."""

import collections

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

from campaign import CLEAR, OUTCOMES, TAKEN, campaign


def check(counts, bad):
    assert not bad, "\n".join(bad)
    total = sum(counts.values(), collections.Counter())
    assert total.keys() <= {CLEAR, TAKEN} and total[CLEAR] > 2 * total[TAKEN] and set(OUTCOMES) >= total.keys()
    return total


def test_a_sample_of_each_kind(tmp_path):
    counts, bad = campaign(tmp_path, every=100)
    assert check(counts, bad).total() >= 40


@pytest.mark.slow
def test_all_of_them(tmp_path):
    counts, bad = campaign(tmp_path)
    assert check(counts, bad).total() >= 1000
