"""How a command ends: whatever happens is a line and an exit status, and never a traceback.

0 done; 2 bad input, which the line names with the way out; 1 the work failed; 130 after Ctrl-C; 141, without a line, if
who read the output is gone. What this package did not foresee is 1, and the line says in which file the traceback is.
"""

import contextlib
import functools
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import NoReturn

from imagereward_jax.terminal import say

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 128 + signal.SIGINT
CUT_OFF = 141  # as a shell says of SIGPIPE, which Windows does not have
_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
# The extra of pyproject.toml that installs a package which is not among the base's.
EXTRAS = {
    **dict.fromkeys(("absl", "clu", "datasets", "grain", "ml_collections", "optax", "orbax"), "train"),
    "tensorboard": "train",
    **dict.fromkeys(("tensorflow", "tensorflow_datasets"), "tfds"),
    **dict.fromkeys(("diffusers", "torch"), "convert"),
    "gradio": "demo",
    "qwix": "quantization",
    "wandb": "wandb",
}
# Where Linux shows accelerators: NVIDIA's (also of Jetson and WSL), AMD's, others' graphics, TPUs.
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd", "dri", "accel*", "vfio/[0-9]*")
_PACKAGE = Path(__file__).resolve().parent
_OWN = (_PACKAGE, _PACKAGE.parent / "convert")  # the latter in a checkout
PATIENCE = 1.0  # seconds from a second Ctrl-C to the end of the process, whatever it does
PROMPT = 1.0  # seconds in which an interrupted command should have ended; else it says why it has not
_answers: list[Callable[[], None]] = []  # of the work that goes on, the innermost last
# Modules in C++ whose start is interrupted raise another error, or crash.
_STARTS_EXTENSION = (ExtensionFileLoader.create_module.__code__, ExtensionFileLoader.exec_module.__code__)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Makes `main(argv=None)` the entry of a command: it returns the exit status, see the module.

    An exception class says its status by an attribute `exit_status`. Else a ValueError that this package raised, and an
    error about a path, is bad input. If a package of an extra is not installed, the line names the extra.

    In a module that runs as a script (`script`: as if it did), a process that was interrupted ends without Python's own
    end, in which jax's threads may crash, and a second Ctrl-C ends it even while it compiles, which no exception
    interrupts.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None, *, script: bool = main.__module__ == "__main__") -> int:
        # A job in the background is started with Ctrl-C ignored, and stays so; SIGTERM is answered there as well.
        interrupts = script and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if script:
            _keep_quiet()
        try:
            if script:
                _CtrlC(interrupts)
            return main(argv)
        except KeyboardInterrupt as stop:
            say("; ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
            if script:
                end_interrupted()
            return INTERRUPTED
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads(error):
                return CUT_OFF
            status, text = explain(error)
            say(f"error: {text}", file=sys.stderr)
            return status
        finally:
            if interrupts:  # nobody catches the exception any more
                signal.signal(signal.SIGINT, lambda *_: end_interrupted())

    return run


def explain(error: Exception) -> tuple[int, str]:
    """(exit status, text) of an error; keeps the traceback of one that was not foreseen in a file."""
    package = str(error.name).partition(".")[0] if isinstance(error, ModuleNotFoundError) else None
    if package in EXTRAS:
        return BAD_INPUT, f"this needs {package}: pip install 'imagereward-jax[{EXTRAS[package]}]'"
    if hasattr(error, "exit_status"):
        return error.exit_status, str(error)
    if isinstance(error, ValueError) and _is_own(error):
        return BAD_INPUT, str(error)
    if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
        text = str(error) if error.errno is None else f"{error.filename}: {error.strerror}"
        return (BAD_INPUT if isinstance(error, _PATHS) else FAILED), text
    first = (str(error).strip().splitlines() or [""])[0]
    return FAILED, f"not foreseen: {type(error).__name__}: {first} ({_place(error)}); {_keep(error)}"


def _keep_quiet():
    """Keeps what libraries print at their start out of the terminal; what the user has set stays.

    A plugin of jax that is installed, for `plan` say, prints a traceback on a machine without its device.
    """
    devices = (path for pattern in _ACCELERATORS for path in Path("/dev").glob(pattern))
    if sys.platform == "linux" and not any("TPU" in name for name in os.environ) and next(devices, None) is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _nobody_reads(error):
    """Whether who read what this package prints is gone, as of `| head`; then no more is written there."""
    if Path(traceback.extract_tb(error.__traceback__)[-1].filename).stem != "terminal":
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _is_own(error):
    """Whether this package or one of its scripts raised it, not a library that it called."""
    if type(error).__module__.startswith("imagereward_jax"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _in_package(frames[-1])


def _in_package(frame):
    return any(Path(frame.filename).resolve().is_relative_to(folder) for folder in _OWN)


def _place(error):
    """The last line of this package that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = list(filter(_in_package, frames)) or frames
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else "nowhere"


def _keep(error):
    """Writes the traceback to a file; says where."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="imagereward_jax_", suffix=".traceback", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(text)
        return f"the traceback is in {file.name}"
    except OSError as full:
        return f"the traceback could not be kept ({full.strerror})"


@contextlib.contextmanager
def answering(answer: Callable[[], None]) -> Iterator[None]:
    """Calls `answer` when a signal comes to a command, from a thread: a handler would wait for the compiler.

    Args:
        answer: says what will be saved, and when.
    """
    _answers.append(answer)
    try:
        yield
    finally:
        _answers.remove(answer)


def end_interrupted() -> NoReturn:
    """Ends this process and its workers at once."""
    # A module that was never imported has started no worker.
    for child in getattr(sys.modules.get("multiprocessing"), "active_children", list)():
        child.kill()
    os._exit(INTERRUPTED)


class _CtrlC:
    """Handles signals in a script: the first Ctrl-C interrupts it once, so that nothing disturbs what cleans up
    behind it.

    Args:
        interrupts: whether Ctrl-C does; else the signals that the work itself handles are answered alone.
    """

    def __init__(self, interrupts: bool):
        self.interrupted, self.presses = False, 0
        pressed, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        sys.unraisablehook = self._unraisable
        if interrupts:
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
        elif str(unraisable.exc_value) != "Event loop is closed":  # a write of Orbax after another of them failed
            sys.__unraisablehook__(unraisable)

    def _again(self):
        """Interrupts a little later."""
        self.interrupted, self.presses = False, self.presses - 1
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()

    def _say_busy(self):
        if self.presses < 2:
            say("stopping when what is compiled or computed now is done; Ctrl-C again ends at once", file=sys.stderr)

    def _watch(self, pressed):
        """Answers a signal, and ends the process after a second Ctrl-C."""
        while self.presses < 2:
            signals = os.read(pressed, 4096)
            self.presses += signals.count(signal.SIGINT)
            if _answers:
                _answers[-1]()
            elif self.presses == 1:
                late = threading.Timer(PROMPT, self._say_busy)
                late.daemon = True
                late.start()
        time.sleep(PATIENCE)
        say("interrupted", file=sys.stderr)
        end_interrupted()
