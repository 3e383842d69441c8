"""What a run says while nothing else shows."""

import re
import time

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from toy import toy_config

from imagereward_jax.training import progress


def test_long_work_shows_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    shown = progress.Progress(toy_config(), None, main=True)
    with shown.waiting("compiling"):
        time.sleep(0.2)
    assert re.search(r"compiling: 0 s", capsys.readouterr().err)
    with progress.Progress(toy_config(), None, main=False).waiting("compiling"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
