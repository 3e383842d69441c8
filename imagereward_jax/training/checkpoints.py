"""Checkpoints of a run (Orbax): state, data positions and open log window; the latest ones and the best."""

import functools
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from imagereward_jax.storage.errors import way_out
from imagereward_jax.training.checksums import checksums, text_checksum
from imagereward_jax.training.interruptions import wait_for_all
from imagereward_jax.training.mesh import from_all_processes

DAMAGED = "damaged_checkpoints"  # in the workdir: folders that could not be read, kept for the user
# How errors of a full disk read.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED")
_LINE = 160  # characters of what Orbax says; it adds the settings of its storage
_CHECKSUMS, _OWN = "checksums", "loop"  # in the loop's file: of the state's arrays, and of the file's other values


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says where and why."""

    exit_status = 1


def goodness(metrics: Mapping[str, float], best: str) -> float:
    """A number that is largest for the best evaluation: the metric `best`, negated after a minus in its name.

    Evaluations without the metric, or whose value is not a number, are the worst: minus infinity.
    """
    value = metrics.get(best.removeprefix("-"), math.nan)
    value = -value if best.startswith("-") else value
    return -math.inf if math.isnan(value) else value


def exports_best(config: Any) -> bool:
    """Whether the best checkpoint by config.eval.best is exported, not the last."""
    return config.checkpoint.best_only or config.checkpoint.export == "best"


class Checkpoints:
    """The folder WORKDIR/checkpoints.

    Args:
        folder: made if absent.
        keep: how many of the latest stay; the best by each of `best` stays as well.
        best: names of metrics whose largest value is best; with a minus before it, the smallest.
        read_only: changes nothing there, since another process may be writing.
    """

    def __init__(self, folder: str | Path, *, keep: int, best: Sequence[str], read_only: bool = False):
        def best_by(name):
            metric = functools.partial(goodness, best=name)
            return BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False)

        self.folder, self.ranked_by = Path(folder).absolute(), tuple(best)
        self.damaged = self.folder.with_name(DAMAGED)
        self.set_aside_at_start = [] if read_only else self._clean()
        logging.getLogger("absl").addFilter(_not_orbax)
        logging.getLogger("asyncio").addFilter(_was_retrieved)
        policy = AnyPreservationPolicy([LatestN(keep), *(best_by(name) for name in best)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=functools.partial(goodness, best=best[0] if best else ""),  # without it, no metrics are kept
            read_only=read_only,
        )
        with self._explained("make room for"):
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "loop"))

    def latest(self) -> int | None:
        """The last checkpoint's step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all checkpoints, the latest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _clean(self):
        """Process 0 removes what a kill left of a write, and sets aside what is no checkpoint; returns the latter."""
        found = []
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            found = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and not _is_whole(path)]
            self._move(found)
        return from_all_processes(sorted(found))[0]

    def set_aside(self, steps: Iterable[int]) -> None:
        """Moves checkpoints that could not be read to WORKDIR/`DAMAGED`; every process has to call it."""
        if jax.process_index() == 0:
            self._move(steps)
        wait_for_all("set damaged checkpoints aside")
        self._manager.reload()

    def _move(self, steps):
        for step in steps:
            target = self.damaged / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)

    def best(self, name: str) -> tuple[float, int] | None:
        """(goodness, step) of the best checkpoint by a metric, the latest of equal ones; None if none has it."""
        self.wait()
        found = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        ranked = [(goodness(metrics, name), step) for step, metrics in found.items() if metrics]
        return max([one for one in ranked if one[0] > -math.inf], default=None)

    def save(self, step: int, state: Any, loop: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Writes in the background; a checkpoint that is there already stays.

        Args:
            loop: values for JSON: data positions, the open log window.
            metrics: the evaluation at this step, if there was one.

        Raises:
            CheckpointError: this or an earlier write failed (a full disk, say).
        """
        if step in self._manager.all_steps():
            return
        sums = {**checksums(state), _OWN: text_checksum(loop)}
        loop = {**loop, _CHECKSUMS: sums}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        with self._explained("write"):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        with self._explained("write"):
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, loop) of a step; `abstract_state` gives shapes, dtypes and shardings, which may be another mesh's.

        Raises:
            CheckpointError: it cannot be read, or is not what was saved.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), loop=ocp.args.JsonRestore())
        with self._explained("read", f"the checkpoint {self.folder / str(step)}"):
            restored = self._manager.restore(step, args=args)
            state, loop = restored.state, dict(restored.loop)
            if expected := loop.pop(_CHECKSUMS, None):  # those of before have none
                found = {**checksums(state), _OWN: text_checksum(loop)}
                differ = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
                if differ:
                    raise ValueError(f"{len(differ)} of its arrays are not what was saved: {min(differ)}")
        return state, loop

    def close(self) -> None:
        """Releases the folder.

        Raises:
            CheckpointError: a write in the background failed.
        """
        with self._explained("write"):
            self._manager.close()

    def _explained(self, verb, what=""):
        return _Explained(f"could not {verb} {what or f'a checkpoint in {self.folder}'}")


class _Explained:
    """Turns any error of Orbax into a `CheckpointError` that says where and why."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return
        if isinstance(error, CheckpointError):
            return
        reason = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
        if full := next((sign for sign in _FULL if sign in str(error)), ""):
            reason = f"{full} ({way_out()})"
        raise CheckpointError(f"{self.what}: {reason}") from error


def _is_whole(folder):
    """Whether the parts of a checkpoint are there and its small files can be read: Orbax looks at them at the start."""
    try:
        for name in ("loop/metadata", "metrics/metrics"):
            if name == "loop/metadata" or (folder / "metrics").exists():
                json.loads((folder / name).read_bytes())
        return (folder / "_CHECKPOINT_METADATA").is_file() and any((folder / "state").iterdir())
    except (OSError, ValueError, RecursionError):
        return False


def _not_orbax(record):
    """Orbax reports every array, and every checkpoint without metrics. Its errors pass as a line each, without their
    tracebacks: they are raised as well."""
    if "orbax" not in record.pathname:
        return True
    record.msg, record.args, record.exc_info, record.exc_text = record.getMessage()[:_LINE], (), None, None
    return record.levelno >= logging.ERROR


def _was_retrieved(record):
    """Of tasks of Orbax that failed together asyncio reports all but the first, which is raised."""
    return "exception was never retrieved" not in record.getMessage()


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of `state`, for `Checkpoints.restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
