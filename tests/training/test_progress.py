"""What a run says while nothing else shows."""

import re
import signal
import time

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from toy import toy_config

from imagereward_jax import command
from imagereward_jax.training import progress
from imagereward_jax.training.interruptions import catch_signals


def test_long_work_shows_that_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress.waiting("compiling", main=True):
        time.sleep(0.2)
    assert re.search(r"compiling: 0 s", capsys.readouterr().err)
    with progress.waiting("compiling", main=False):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "told"), [(3.0, []), (6.0, [(1000, 1500.0)])])
def test_a_long_evaluation_is_foretold_after_its_second_batch(seconds, told):
    """1,000 images in batches of 4: of 6 s each they take 25 minutes, of 3 s (12.5, of which 12.4 are left) as well,
    but under a limit of 20 nobody is told. The first batch compiles for an hour, which does not count."""
    now, moved, found = iter([3600.0, *(3600 + seconds * batch for batch in range(1, 1000) for _ in range(2))]), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LONG", 1200.0)
        update = progress.foretelling(moved.append, 1000, lambda *of: found.append(of), clock=lambda: next(now))
        for _ in range(250):
            update(4)
    assert sum(moved) == 1000 and found == told


@pytest.mark.parametrize(
    ("stage", "saved", "told"),
    [
        ("opening", None, r"stops before its first step \(.* continues from the start\)$"),
        ("compiling", None, r"stops when the training step is compiled, and saves step 7 \("),
        ("training", 5, r"stops when this step is done, and saves it \(.* continues from step 5\)$"),
        ("on policy", 5, r"next round or update, and saves step 7 if the next has made no update \("),
        ("evaluating", 5, r"stops when this evaluation is done, and saves step 7 \("),
        ("exporting", 7, r"all 7 steps are saved: the run is complete when its export is written \("),
    ],
)
def test_a_signal_is_answered_once_at_once(stage, saved, told, capsys):
    """By what goes on, what will be saved and when; also while the main thread does not get to its handlers."""
    shown = progress.Progress(toy_config(), None, main=True)
    shown.step, shown.saved = 7, saved
    with catch_signals(shown.answer) as caught, shown.during(stage):
        command._answers[-1]()  # as the thread that watches for signals does, before any handler
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert caught == [signal.SIGTERM] * 2 and not command._answers
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line)
