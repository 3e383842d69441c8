"""Runs that are killed at random moments, and the memory of long ones: the programs beside this file, in small."""

import json
import subprocess
import sys
from pathlib import Path

import child
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")
pytest.importorskip("ml_collections")

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def run(program, *arguments):
    command = [sys.executable, str(HERE / program), *arguments]
    done = subprocess.run(command, env=child.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_every_method_survives_a_kill_and_a_signal():
    """Also `score`, and two processes that fill a cache; 30 moments, and each ends in equal bits."""
    said = run("kills.py", "--kills", "12", "--terms", "12", "--scores", "3", "--caches", "3")
    assert "| **all** | | | 30 | 30 |" in said


@pytest.mark.parametrize(("name", "most"), [("steps", 0.5), ("train", 3.0), ("score", 1.0)])
def test_memory_is_flat(name, most):
    """MiB that the second half adds, of half of what memory.py does: 1,000 steps or 10,000 rows."""
    found = json.loads(run("memory.py", name, "--here", "--times", "0.5").splitlines()[-1])
    assert found["end"] - found["middle"] < most and found["arrays"] <= 0
