"""Signals that stop a run, and what it says when another process of it is gone."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np

# How collectives over TCP (gloo), NCCL and jax's coordination service say that a peer is gone.
SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo", "NCCL", "UNAVAILABLE")


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


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python sets no handlers, the list stays empty and signals do what they did before.
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(signum, frame):
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt("the same command continues from the latest checkpoint")
        caught.append(signum)

    old = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
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
