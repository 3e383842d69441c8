"""Fixtures of runs that are started in a folder of the user's."""

import pytest


@pytest.fixture
def here(project, monkeypatch):
    """The module's `project`, as the current folder, whose modules can be imported."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    return project
