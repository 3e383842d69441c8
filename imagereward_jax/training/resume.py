"""What a run does before it goes on in a workdir: it locks it, and finds the newest checkpoint that is whole."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from imagereward_jax.storage.errors import writing
from imagereward_jax.storage.lock import Lock, LockedError
from imagereward_jax.training.checkpoints import CheckpointError, Checkpoints, abstract
from imagereward_jax.training.mesh import from_all_processes
from imagereward_jax.training.program import TrainingProgram
from imagereward_jax.training.state import TrainState, from_checkpoint, to_checkpoint
from imagereward_jax.training.workdir import LOCK


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Lock]:
    """Holds the lock of a workdir in process 0; every process hears of a refusal.

    Raises:
        LockedError: another run is at work there. WriteError: the lock cannot be written.
    """
    lock, refused = Lock(workdir / LOCK, f"--workdir {workdir}"), ""
    if jax.process_index() == 0:
        try:
            with writing(workdir):
                lock.acquire()
        except LockedError as error:
            refused = str(error)
    if refused := from_all_processes(refused)[0]:
        raise LockedError(refused)
    try:
        yield lock
    finally:
        lock.release()


def read_state(manager: Checkpoints, program: TrainingProgram, step: int) -> tuple[TrainState, dict[str, Any]]:
    """(state, what the loop saved beside it) of the checkpoint of a step, sharded as the program has it.

    Raises:
        CheckpointError: see `Checkpoints.restore`.
    """
    shapes = abstract(to_checkpoint(program.abstract_state), to_checkpoint(program.state_shardings))
    tree, loop = manager.restore(step, shapes)
    return from_checkpoint(tree), loop


def newest_whole(manager: Checkpoints, take: Callable[[int], None], say: Callable[[str], None]) -> int | None:
    """Takes over the newest checkpoint that can be read; sets damaged ones aside, and says so.

    Args:
        take: takes over what the checkpoint of a step holds; raises if it is damaged. Called in every process.

    Returns:
        Its step; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    damaged = dict.fromkeys(manager.set_aside_at_start, "files are missing or cut short")
    found = None
    for step in manager.steps():
        reason = _reason_against(take, step)
        if not reason:
            found = step
            break
        damaged[step] = reason
    if damaged and found is None:
        raise CheckpointError(f"no checkpoint is whole ({next(iter(damaged.values()))}): start in another --workdir")
    manager.set_aside(step for step in damaged if step not in manager.set_aside_at_start)
    for step, reason in damaged.items():
        say(f"warning: the checkpoint of step {step} is damaged, now in {manager.damaged / str(step)}: {reason}")
    return found


def _reason_against(take, step):
    """Why a checkpoint cannot be taken over, in any process; "" if it was."""
    reason = ""
    try:
        take(step)
    except CheckpointError as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"its file of positions cannot be used ({type(error).__name__}: {error})"
    return next(filter(None, from_all_processes(reason)), "")
