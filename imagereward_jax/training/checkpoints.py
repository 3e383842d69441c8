"""Checkpoints of a run (Orbax): state, data positions and open log window; the latest ones and the best."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says where and why."""


def goodness(metrics: dict[str, float], best: str) -> float:
    """A number that is largest for the best evaluation: the metric `best`, negated after a minus in its name."""
    return -metrics[best[1:]] if best.startswith("-") else metrics[best]


class Checkpoints:
    """The folder WORKDIR/checkpoints.

    Args:
        folder: made if absent.
        keep: how many of the latest stay; the best by `best` stays as well.
        best: name of the metric whose largest value is best; with a minus before it, the smallest.
    """

    def __init__(self, folder: str | Path, *, keep: int, best: str):
        def value(metrics):
            return goodness(metrics, best)

        self.folder = Path(folder).absolute()
        logging.getLogger("absl").addFilter(_not_orbax)
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=value),
            item_names=("state", "loop"),
        )

    def latest(self) -> int | None:
        """The last whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the best checkpoint that has metrics, or None."""
        return self._manager.best_step()

    def best_metrics(self) -> dict[str, float] | None:
        """The evaluation of the best checkpoint, or None."""
        self.wait()
        step = self._manager.best_step()
        return None if step is None else self._manager.metrics(step)

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
