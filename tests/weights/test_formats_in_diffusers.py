"""Every format of models and adapters beside PyTorch diffusers: images within 1e-4, round trips to the bit."""

import os
import sys

import pytest

for name in ("torch", "diffusers", "peft"):
    pytest.importorskip(name, reason="the reference is PyTorch diffusers")
pytest.importorskip("orbax.checkpoint")

from formats_in_diffusers import LIMIT, compare, table

OLD_PYTHON = os.environ.get("OLD_DIFFUSERS_PYTHON")  # an interpreter with diffusers 0.27, or none


def check(rows, versions):
    print(table(rows, versions))
    faults = [f"{row.case.name}, {row.case.family}: {fault}" for row in rows for fault in row.faults]
    assert not faults, "\n".join(faults)
    assert all(0 < value < LIMIT for row in rows for value in row.images.values())
    assert {row.exact for row in rows} <= {True, None}


@pytest.mark.slow
def test_every_format(tmp_path):
    """With diffusers 0.27 too if OLD_DIFFUSERS_PYTHON names its interpreter."""
    pythons = {"new": sys.executable} | ({"old": OLD_PYTHON} if OLD_PYTHON else {})
    rows, versions = compare(tmp_path, pythons)
    check(rows, versions)
    assert len(rows) >= 38 and sum(row.exact is True for row in rows) >= 20
    assert all("new" in row.images for row in rows)
