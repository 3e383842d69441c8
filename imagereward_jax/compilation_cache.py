"""Compiled programs are kept on disk, so that the next start of the same command compiles less."""

import argparse
import contextlib
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagereward_jax.terminal import say

FOLDER = "IMAGEREWARD_JAX_CACHE"  # the environment variable that moves the folder, or says "off"


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --no-compilation-cache to a command."""
    parser.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help=f"do not keep compiled programs in ~/.cache/imagereward_jax; the variable {FOLDER}=DIR moves that",
    )


def use_compilation_cache(enabled: bool = True) -> Path | None:
    """Turns jax's persistent compilation cache on; commands call this before anything compiles.

    The folder is what JAX_COMPILATION_CACHE_DIR says, else `default_folder()`. jax keeps programs that take a second
    or more to compile (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS), in runs of several processes those of process 0,
    and never those that call back into Python. Where the folder cannot be written, that is said once on stderr.

    Args:
        enabled: False does nothing: only a cache that the user set up for jax is then used.

    Returns:
        The folder, or None if nothing is kept.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    if not enabled or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder = default_folder()
        if folder is None:
            return None
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # who can write into it can run programs here
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where home is
        say(
            f"warning: compiled programs are not kept for the next start ({error}); set {FOLDER} to a folder that can "
            "be written, or to off",
            file=sys.stderr,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


@contextlib.contextmanager
def counting_hits() -> Iterator[list[str]]:
    """Yields a list that has an entry for each program that was read from the cache instead of compiled meanwhile."""
    import jax

    found: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)


def default_folder() -> Path | None:
    """Where programs compiled on this kind of machine are kept, or None if IMAGEREWARD_JAX_CACHE is "off".

    A folder of its own for each kind of CPU, in IMAGEREWARD_JAX_CACHE or XDG_CACHE_HOME/imagereward_jax/compiled
    (~/.cache/imagereward_jax/compiled): programs for one CPU may not run on another that shares the home directory.
    """
    given = os.environ.get(FOLDER, "")
    if given == "off":
        return None
    if given:
        root = Path(os.path.expanduser(given))
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagereward_jax" / "compiled"
    return root / machine_name()


def machine_name() -> str:
    """Names this kind of machine: programs compiled for its CPU may not run on one of another name."""
    return f"{platform.machine()}-{hashlib.sha256(_cpu().encode()).hexdigest()[:8]}"


def _cpu():
    """What the CPU can do, as Linux says it; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
