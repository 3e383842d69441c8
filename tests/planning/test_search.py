"""The largest batch and the smallest slice, with the compiler replaced by a formula, and once with the real one."""

import itertools

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.planning import search
from imagereward_jax.planning.topologies import GIB, find_topology
from imagereward_jax.recipes import default_config

H200 = find_topology("h200:8")


def searched(monkeypatch, total, *, usable=100 * GIB, told=True, known=None):
    """(result, samples tried in order) where a step of so many samples a chip takes `total(samples)` bytes."""
    order = []

    def figures_of(samples):
        size, fits = total(samples), total(samples) <= usable
        return {
            "fits": fits,
            "samples_per_chip": samples,
            "usable_bytes": usable,
            "hbm_bytes": usable,
            "compile_seconds": 1,
            "temp_bytes": 0 if fits or told else None,
            "bytes_per_chip": {"total": size if fits or told else 5 * GIB},
        }

    def plan(config, topology):
        order.append(config.batch_size // topology.chips // config.accumulation)
        return figures_of(order[-1])

    monkeypatch.setattr(search, "plan", plan)
    config = default_config("refl")
    config.accumulation = 2
    said = []
    known = known and figures_of(known)
    return search.largest_batch(config, H200, said.append, known), order, said


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("base, slope", list(itertools.product([5.0, 40.0, 97.0], [0.07, 0.84, 3.3, 7.0, 50.0])))
def test_finds_the_largest_in_few_tries(monkeypatch, base, slope, told):
    """Exact to 16 samples and to an eighth above, whether or not the compiler says how much too much it was."""
    (samples, batch), order, said = searched(monkeypatch, lambda n: int((base + slope * n) * GIB), told=told)
    largest = int((100 - base) / slope)
    assert samples <= largest and batch == samples * 8 * 2
    assert samples == largest if largest <= 16 else samples > 7 / 8 * largest
    assert len(order) == len(set(order)) == len(said) and len(order) <= (8 if told else 12)


def test_memory_that_the_compiler_saves_near_the_limit(monkeypatch):
    """Not a line: a compiler that has to will save a third of what comes above 80 GiB."""

    def total(samples):
        line = (10 + 3 * samples) * GIB
        return min(line, 80 * GIB + (line - 80 * GIB) * 2 // 3)

    (samples, _), order, _ = searched(monkeypatch, total)
    assert samples in (32, 33) and len(order) <= 10  # 80 + (10 + 3 n - 80) 2 / 3 = 100: n = 33.3; steps of 4 or 2


def test_starts_from_what_is_known(monkeypatch):
    (samples, _), order, said = searched(monkeypatch, lambda n: (10 + 9 * n) * GIB, known=8)
    assert samples == 10 and 8 not in order and said[0].startswith("8 sample(s) a chip: fits: 82.00 GiB")


def test_nothing_fits(monkeypatch):
    assert searched(monkeypatch, lambda n: 101 * GIB)[0] == (0, 0)
    assert searched(monkeypatch, lambda n: 101 * GIB, known=16, told=False)[0] == (0, 0)
