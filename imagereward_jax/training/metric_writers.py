"""Where a run's numbers go: metrics.jsonl, TensorBoard, the log; and the averaging between two log steps."""

import json
import os
import time
from pathlib import Path

import numpy as np


class Meter:
    """Means of the step metrics since the last log step; its state goes into checkpoints, so that nothing is lost."""

    def __init__(self):
        self.totals, self.count = {}, 0

    def add(self, metrics):
        """metrics: {name: number} of one step."""
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value)
        self.count += 1

    def pop(self):
        """The means since the last call."""
        means = {name: total / self.count for name, total in self.totals.items()}
        self.totals, self.count = {}, 0
        return means

    def get_state(self):
        """What `set_state` takes, and no later `add` changes (checkpoints are written in the background); JSON holds it
        exactly."""
        return {"totals": dict(self.totals), "count": self.count}

    def set_state(self, state):
        """Continues where `get_state` was called."""
        self.totals, self.count = dict(state["totals"]), state["count"]


class JsonlWriter:
    """metrics.jsonl: one object a row with `step`, `time` (seconds since the epoch) and the numbers."""

    def __init__(self, path, *, last_step):
        """Continues after `last_step`: rows past it, left by a run that was killed, are dropped (None drops all)."""
        self.path = Path(path)
        rows = [row for row in read_rows(self.path) if last_step is not None and row["step"] <= last_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)
        self.last = rows[-1]["step"] if rows else None
        self._file = self.path.open("a")

    def write(self, step, metrics):
        """Appends a row; non-finite numbers are written as null, which JSON can hold."""
        numbers = {name: float(value) if np.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **numbers}) + "\n")
        self._file.flush()

    def write_images(self, step, name, image):
        """JSON holds no pictures."""

    def close(self):
        """Ends the file."""
        self._file.close()


class CluWriter:
    """One of clu's metric writers: "tensorboard" (event files in the workdir) or "log"."""

    def __init__(self, kind, workdir):
        from absl import logging
        from clu import metric_writers

        if kind == "log":
            logging.set_verbosity(logging.INFO)  # which is where it writes
        self._writer = (
            metric_writers.SummaryWriter(str(workdir)) if kind == "tensorboard" else metric_writers.LoggingWriter()
        )

    def write(self, step, metrics):
        """Writes the scalars of a step."""
        self._writer.write_scalars(step, metrics)

    def write_images(self, step, name, image):
        """image: uint8 [H, W, 3]."""
        self._writer.write_images(step, {name: image[None]})

    def close(self):
        """Flushes and ends."""
        self._writer.flush()
        self._writer.close()


def make_writers(names, workdir, *, last_step):
    """The writers that `config.writers` names, by name."""
    return {
        name: JsonlWriter(Path(workdir) / "metrics.jsonl", last_step=last_step)
        if name == "jsonl"
        else CluWriter(name, workdir)
        for name in names
    }


def read_rows(path):
    """The rows of a metrics.jsonl; a last row that a kill cut short is left out."""
    path = Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
