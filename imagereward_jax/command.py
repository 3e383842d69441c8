"""How a command ends: Ctrl-C, or a package that an extra would install, is one line and no traceback."""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ExtensionFileLoader
from typing import NoReturn

from imagereward_jax.terminal import say

INTERRUPTED = 128 + signal.SIGINT
NOT_INSTALLED = 2
# The extra of pyproject.toml that installs a package which is not among the base's.
EXTRAS = {
    **dict.fromkeys(("absl", "clu", "datasets", "grain", "matplotlib", "ml_collections", "optax", "orbax"), "train"),
    **dict.fromkeys(("tensorboard", "tensorflow", "tensorflow_datasets"), "train"),
    **dict.fromkeys(("diffusers", "torch"), "convert"),
    "qwix": "quantization",
    "wandb": "wandb",
}
PATIENCE = 2.0  # seconds from a second Ctrl-C to the end of the process, whatever it does
# Modules in C++ whose start is interrupted raise another error, or crash.
_STARTS_EXTENSION = (ExtensionFileLoader.create_module.__code__, ExtensionFileLoader.exec_module.__code__)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Makes `main(argv=None)` the entry of a command: it returns the exit status, 130 after Ctrl-C.

    If a package of an extra is not installed, the status is 2 and the line names the extra.

    In a module that runs as a script, a process that was interrupted ends without Python's own end, in which jax's
    threads may crash, and a second Ctrl-C ends it even while it compiles, which no exception interrupts.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        # A job in the background is started with Ctrl-C ignored, and stays so.
        armed = main.__module__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            if armed:
                _CtrlC()
            return main(argv)
        except KeyboardInterrupt as stop:
            say("; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
            if armed:
                end_interrupted()
            return INTERRUPTED
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package not in EXTRAS:
                raise
            say(f"error: this needs {package}: pip install 'imagereward-jax[{EXTRAS[package]}]'", file=sys.stderr)
            return NOT_INSTALLED
        finally:
            if armed:  # nobody catches the exception any more
                signal.signal(signal.SIGINT, lambda *_: end_interrupted())

    return run


def end_interrupted() -> NoReturn:
    """Ends this process and its workers at once."""
    # A module that was never imported has started no worker.
    for child in getattr(sys.modules.get("multiprocessing"), "active_children", list)():
        child.kill()
    os._exit(INTERRUPTED)


class _CtrlC:
    """Handles Ctrl-C in a script: the first interrupts it once, so that nothing disturbs what cleans up behind it."""

    def __init__(self):
        self.interrupted, self.presses = False, 0
        pressed, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        sys.unraisablehook = self._unraisable
        signal.signal(signal.SIGINT, self._interrupt)
        threading.Thread(target=self._watch, args=(pressed,), daemon=True).start()

    def _interrupt(self, signum, frame):
        if self.interrupted:
            return
        while frame is not None:
            if frame.f_code in _STARTS_EXTENSION:
                self._again()
                return
            frame = frame.f_back
        self.interrupted = True
        raise KeyboardInterrupt

    def _unraisable(self, unraisable):
        """Handles an exception in a destructor or a callback, where Python drops it."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._again()
        else:
            sys.__unraisablehook__(unraisable)

    def _again(self):
        """Interrupts a little later."""
        self.interrupted, self.presses = False, self.presses - 1
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()

    def _watch(self, pressed):
        """Ends the process after a second Ctrl-C; unlike a handler, a thread need not wait for a compiler."""
        while self.presses < 2:
            found = os.read(pressed, 4096).count(signal.SIGINT)
            self.presses += found
        time.sleep(PATIENCE)
        say("interrupted", file=sys.stderr)
        end_interrupted()
