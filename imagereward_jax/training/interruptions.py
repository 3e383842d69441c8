"""Signals that stop a run, and what it says when another process of it is gone."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from imagereward_jax.command import answering

# How collectives over TCP (gloo), NCCL and jax's coordination service say that a peer is gone.
SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo", "NCCL", "UNAVAILABLE")

# What a run does after a signal, by what it is doing when the signal comes.
STOPS = {
    "opening": "the run stops before its first step",
    "evaluating": "the run stops when this evaluation is done, and saves step {step}",
    "compiling": "the run stops when the training step is compiled, and saves step {step}",
    "training": "the run stops when this step is done, and saves it",
    "on policy": "the run stops at the next round or update, and saves step {step} if the next has made no update",
    "exporting": "all {step} steps are saved: the run is complete when its export is written",
}


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""

    exit_status = 1


class ProcessLost(RuntimeError):
    """Another process of this run ended, so that this one cannot go on; the message says so and what to do.

    Raised when a collective operation fails. If a process has several devices that wait for each other, it may not
    fail: then jax ends the process after 100 s, saying "another task died", unless a launcher did so before.
    """


class Interrupted(Exception):
    """SIGTERM or Ctrl-C stopped the run after saving; `signum` says which."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}; the same command continues from there"
        )
        self.signum = signum


def stopping(stage: str, step: int, saved: int | None) -> str:
    """The answer to a signal: what will be saved, and when.

    Args:
        stage: of `STOPS`. step: the last that is done. saved: that of the latest checkpoint, None without one.
    """
    told = STOPS[stage].format(step=step)
    place = "from the start" if saved is None else f"from step {saved}"
    return f"{told} (Ctrl-C again: at once; the same command then continues {place})"


@contextlib.contextmanager
def catch_signals(answer: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to; a second Ctrl-C interrupts at once.

    The first is answered by a call of `answer`, in a command at once, elsewhere when Python gets to its handlers.
    Outside the main thread, where Python sets no handlers, the list stays empty and signals do what they did before.
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    unanswered = threading.Lock()

    def answer_once():
        if unanswered.acquire(blocking=False):
            answer()

    def handle(signum, frame):
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt("the same command continues from the latest checkpoint")
        caught.append(signum)
        # In a thread: what this interrupts may be writing to stderr itself.
        threading.Thread(target=answer_once, daemon=True).start()

    old = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        with answering(answer_once):
            yield caught
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def signal_of_any(caught: list[int]) -> int:
    """The signal that this or another process caught, 0 if none did."""
    last = caught[-1] if caught else 0
    if jax.process_count() == 1:
        return last
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(last)).max())


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"imagereward_jax train: {name}")


@contextlib.contextmanager
def closing(manager) -> Iterator[None]:
    """Closes the checkpoints at the end, unless a process is gone: that would wait for it.

    An error of the block comes through, whatever closing then says: a full disk, say, fails both.

    Raises:
        ProcessLost: a collective operation failed in a run of several processes.
        CheckpointError: a write in the background failed.
    """
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, jax.errors.JaxRuntimeError | ValueError) and jax.process_count() > 1
        if lost and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            reason = str(error).splitlines()[0][:200]
            raise ProcessLost(
                f"process {jax.process_index()} of {jax.process_count()} lost another process of this run ({reason}); "
                "start them all again with the same command: the run continues from its latest checkpoint"
            ) from error
        with contextlib.suppress(Exception):
            manager.close()
        raise
    manager.close()
