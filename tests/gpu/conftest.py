"""Tests on a GPU measure and compare what users run."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do(real_compilation):
    """Applies `real_compilation` to every test here."""
