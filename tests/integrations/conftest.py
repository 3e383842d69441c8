"""What other programs find on a machine: a Python with this package, and a port that nobody listens to."""

import socket
import stat
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """A Python with an environment of its own: this one, with this package."""
    path = tmp_path_factory.mktemp("environment") / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{Path(__file__).parents[2]}" exec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def url():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"http://127.0.0.1:{unused.getsockname()[1]}"
