"""Checkpoints of a run (Orbax): state, data positions and open log window; the latest ones and the best."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says where and why."""


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
    """

    def __init__(self, folder: str | Path, *, keep: int, best: Sequence[str]):
        def best_by(name):
            metric = functools.partial(goodness, best=name)
            return BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False)

        self.folder, self.ranked_by = Path(folder).absolute(), tuple(best)
        logging.getLogger("absl").addFilter(_not_orbax)
        policy = AnyPreservationPolicy([LatestN(keep), *(best_by(name) for name in best)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=functools.partial(goodness, best=best[0] if best else ""),  # without it, no metrics are kept
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "loop"))

    def latest(self) -> int | None:
        """The last whole checkpoint's step, or None."""
        return self._manager.latest_step()

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
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        with self._explained("write"):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        with self._explained("write"):
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, loop) of a step; `abstract_state` gives shapes, dtypes and shardings, which may be another mesh's."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), loop=ocp.args.JsonRestore())
        with self._explained("read"):
            restored = self._manager.restore(step, args=args)
        return restored.state, restored.loop

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()

    def _explained(self, verb):
        return _Explained(f"could not {verb} a checkpoint in {self.folder}")


class _Explained:
    """Turns any error of Orbax into a `CheckpointError` that says where and why."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return
        reason = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
        hint = " (free some room and run the same command again)" if "No space left" in str(error) else ""
        raise CheckpointError(f"{self.what}: {reason}{hint}") from error


def _not_orbax(record):
    """Orbax reports every array, and every checkpoint without metrics; errors pass."""
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def abstract(state: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of `state`, for `Checkpoints.restore`."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
