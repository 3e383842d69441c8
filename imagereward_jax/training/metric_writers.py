"""Writers of a run's numbers (metrics.jsonl, the terminal, TensorBoard, W&B), and the averaging between two log steps.

None of them imports TensorFlow, which would cost each start four seconds.
"""

import importlib
import io
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from imagereward_jax.storage.errors import writing
from imagereward_jax.storage.files import whole_file, write_text
from imagereward_jax.terminal import escape, say
from imagereward_jax.training.interruptions import RunError

METRICS = "metrics.jsonl"  # in the workdir
WANDB_RUN = "wandb_run.json"  # in the workdir, the id that a resumed run continues
TEST = "test/"  # how metrics of the test set begin
COUNTERS = ("skipped", "learning_rate", "images")  # metrics whose last value is logged, not their mean


class Meter:
    """Means of the step metrics since the last log step; of `COUNTERS` the last value.

    Its state goes into checkpoints, so that a resumed run logs the same numbers.
    """

    def __init__(self):
        self.totals, self.last, self.count = {}, {}, 0

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of one step: {name: number}."""
        for name, value in metrics.items():
            if name in COUNTERS:
                self.last[name] = float(value)
            else:
                self.totals[name] = self.totals.get(name, 0.0) + float(value)
        self.count += 1

    def pop(self) -> dict[str, float]:
        """Returns the means and counts since the last call, and begins anew."""
        row = {**{name: total / self.count for name, total in self.totals.items()}, **self.last}
        self.totals, self.last, self.count = {}, {}, 0
        return row

    def get_state(self) -> dict[str, Any]:
        """Copies the state for `set_state`: checkpoints are written in the background. JSON holds it exactly."""
        return {"totals": dict(self.totals), "last": dict(self.last), "count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state`; earlier versions kept the counters among the totals and no "last"."""
        self.totals = {name: total for name, total in state["totals"].items() if name not in COUNTERS}
        self.last, self.count = dict(state.get("last", {})), state["count"]


class MetricWriter(Protocol):
    """A destination of a run's numbers and images."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of a step."""

    def write_images(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one image, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Writes what is left and ends."""


class JsonlWriter:
    """metrics.jsonl: one object per row with `step`, `time` (seconds since the epoch) and the numbers."""

    def __init__(self, path: str | os.PathLike, *, last_step: int | None, ended: int | None = None):
        """Continues after `last_step`: rows past it, left by a run that was killed, are dropped (None drops all).

        Rows of the test set are written again by a run whose end (`ended`, None: none) did not come after them.
        Damaged lines are told and dropped.
        """
        self.path = Path(path)
        rows, damaged = read_lines(self.path)
        for number in damaged:
            say(f"warning: {self.path}, line {number} is damaged and is left out", file=sys.stderr)
        rows = [row for row in rows if last_step is not None and row["step"] <= last_step]
        rows = [row for row in rows if row["step"] <= (-1 if ended is None else ended) or not rows_with([row], TEST)]
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.last = rows[-1]["step"] if rows else None
        with writing(self.path):
            self._file = self.path.open("a")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a row; non-finite numbers are written as null, which JSON can hold."""
        numbers = {name: float(value) if np.isfinite(value) else None for name, value in metrics.items()}
        with writing(self.path):
            self._file.write(json.dumps({"step": step, "time": time.time(), **numbers}) + "\n")
            self._file.flush()

    def write_images(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes nothing: JSON holds no images."""

    def close(self) -> None:
        """Closes the file."""
        with writing(self.path):
            self._file.close()


class TensorBoardWriter:
    """TensorBoard event files in the workdir, written in the background: the disk may be far away."""

    def __init__(self, workdir: str | os.PathLike, *, last_step: int | None):
        """Continues after `last_step`: TensorBoard drops what a killed run wrote past it (None: everything)."""
        from clu import asynclib
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._async_error = Event, Summary, asynclib.AsyncError
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (Path(workdir) / name).open("wb")
        self._records = RecordWriter(self._file)
        self._pool = asynclib.Pool("tensorboard", max_workers=1)  # one: in order
        self._append_later = self._pool(self._append)
        self._append(Event(wall_time=now, file_version="brain.Event:2"))
        first = 0 if last_step is None else last_step + 1
        self._append(Event(wall_time=now, step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        values = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(step, values)

    def write_images(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one image, uint8 [H, W, 3], as PNG."""
        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        encoded = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        self._write(step, [self._summary.Value(tag=name, image=encoded)])

    def close(self) -> None:
        """Waits until all is written."""
        self._raise_own(self._pool.close)
        self._file.close()

    def _write(self, step, values):
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._raise_own(self._append_later, event)

    def _append(self, event):
        self._records.write(event.SerializeToString())
        self._file.flush()

    def _raise_own(self, function, *arguments):
        """Calls the pool; raises an error of its thread as what it was."""
        try:
            function(*arguments)
        except self._async_error as error:
            raise error.__cause__ from None


class LogWriter:
    """The terminal: a line above the bar on stderr, of what a run does not say there by itself."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of a step on one line, but for those of evaluations."""
        shown = {name: value for name, value in metrics.items() if not name.startswith(("eval/", TEST))}
        if shown:
            tqdm.write(escape(f"step {step}: {listed(shown)}"), file=sys.stderr)

    def write_images(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes nothing: a terminal shows no images."""

    def close(self) -> None:
        """Has nothing left to write."""


class WandbWriter:
    """A W&B run: scalars and images by step, in WORKDIR/wandb and, unless WANDB_MODE=offline, on the server.

    Its id is kept in the workdir, so that a resumed run continues it; what is written offline is in a folder for each
    start, all of one id, which `wandb sync` uploads. Rows that a killed run wrote past its checkpoint stay: they have
    the numbers that the resumed run computes again. Project, entity and mode are W&B's own variables (WANDB_PROJECT,
    ...); the run has the workdir's name.

    Raises:
        RunError: W&B does not start (no key, no network).
    """

    def __init__(self, workdir: str | os.PathLike):
        import wandb

        workdir = Path(workdir).absolute()
        path = workdir / WANDB_RUN
        if not path.is_file():
            write_text(path, json.dumps({"id": secrets.token_hex(4)}))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "imagereward-jax"),
                name=workdir.name,
                id=json.loads(path.read_text())["id"],
                resume="allow",
                reinit="create_new",  # beside a run that the caller may have open
                dir=workdir,
                config=json.loads((workdir / "config.json").read_text()),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"config.writers: W&B did not start ({error}): run `wandb login`, set WANDB_MODE=offline, or leave "
                "'wandb' out"
            ) from error
        self._image = wandb.Image

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the scalars of a step."""
        self._run.log({name: float(value) for name, value in metrics.items()}, step=step)

    def write_images(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one image, uint8 [H, W, 3]."""
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        """Writes what is left and ends the run."""
        self._run.finish()


def check_installed(names: Iterable[str]) -> None:
    """Imports what the writers `names` need that the extra `train` does not install.

    Raises:
        ModuleNotFoundError: it is not installed; says with which extra it is.
    """
    if "wandb" in names:
        try:
            importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            way_out = "pip install 'imagereward-jax[wandb]', or leave it out"
            raise ModuleNotFoundError(
                f"config.writers: 'wandb' needs {error.name}: {way_out}", name=error.name
            ) from error


def listed(metrics: Mapping[str, float]) -> str:
    """Metrics in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def make_writers(
    names: Iterable[str], workdir: str | os.PathLike, *, last_step: int | None, ended: int | None = None
) -> dict[str, MetricWriter]:
    """Makes the writers that `config.writers` names, by name.

    Args:
        last_step: the step that the run continues after. ended: the step at which it last ended, test and export done.
    """
    makers = {
        "jsonl": lambda: JsonlWriter(Path(workdir) / METRICS, last_step=last_step, ended=ended),
        "tensorboard": lambda: TensorBoardWriter(workdir, last_step=last_step),
        "log": LogWriter,
        "wandb": lambda: WandbWriter(workdir),
    }
    return {name: makers[name]() for name in names}


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the rows of a metrics.jsonl, without damaged ones."""
    return read_lines(path)[0]


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """Reads a metrics.jsonl: (whole rows, numbers of damaged lines); a last line that a kill cut is in neither."""
    path = Path(path)
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else (b"",)
    rows, damaged = [], []
    for number, line in enumerate([*lines, last], 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("not a row")
            rows.append(row)
        except (ValueError, RecursionError):
            if number <= len(lines):
                damaged.append(number)
    return rows, damaged


def rows_with(rows: Iterable[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """The rows that have a metric whose name begins so ("eval/": the evaluations)."""
    return [row for row in rows if any(name.startswith(prefix) for name in row)]


def rounded(value: float | None) -> str:
    """Four digits of a metric; "" if it has no finite value."""
    return "" if value is None else f"{value:.4g}"
