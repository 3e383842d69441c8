"""Weights that are not finite end a run; no checkpoint, export or evaluation has them."""

from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from imagereward_jax.training.checkpoints import Checkpoints
from imagereward_jax.training.interruptions import RunError
from imagereward_jax.training.state import TrainState

_LOWER = "lower config.optimizer.learning_rate, or use config.dtype='float32',"


def not_finite(state: TrainState) -> list[str]:
    """The arrays of a state that hold NaN or Inf, by their paths.

    Programs of their own: within the step, looking at every array would take minutes to compile (`step._smallest`).
    """
    finite = jax.device_get(jax.tree.map(_finite, state))
    return [jax.tree_util.keystr(path) for path, value in jax.tree_util.tree_leaves_with_path(finite) if not value]


@jax.jit  # of one array: equal shapes, of weights, moments and averages, compile once
def _finite(array):
    return jnp.isfinite(array).all()


def require_finite(state: TrainState, step: int, checkpoints: Checkpoints) -> None:
    """Looks at every array of the state after `step`; what is not finite was made by an update since the latest
    checkpoint.

    Raises:
        RunError: naming an array and the latest checkpoint.
    """
    if not (broken := not_finite(state)):
        return
    checkpoints.wait()
    latest = checkpoints.latest()
    kept = "there is no checkpoint of before"
    if latest is not None:
        kept = f"the last good weights are in {checkpoints.folder / str(latest)}"
    raise RunError(
        f"after step {step} {len(broken)} arrays of weights, moments or averages are not finite ({broken[0]}): {kept}; "
        f"{_LOWER} and start in another --workdir"
    )


def skipped_too_often(skipped: int, kept: Path, broken: Iterable[str], reward: str | None) -> RunError:
    """The error of a run in which too many updates in a row were not finite.

    Args:
        kept: the checkpoint of the last good update. broken: metrics of rewards that are not finite.
        reward: config.reward.path, if the method has one.
    """
    advice = _LOWER
    if broken := ", ".join(broken):
        where = f"config.reward.path={reward!r}" if reward else "config.reward"
        advice = f"{where} gave scores that were not finite ({broken}): mend it,"
    return RunError(
        f"{skipped} updates in a row had a loss, gradients or a result that were not finite (config.max_skipped): the "
        f"weights of the last good update are in {kept}; {advice} and start in another --workdir"
    )
