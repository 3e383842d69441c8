"""A trace of some steps for TensorBoard's profiler."""

from pathlib import Path

import jax


class Profiler:
    """Traces `steps` steps of a run into a folder, after the first two.

    Args:
        folder: made by the trace. steps: 0 traces nothing.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self._start = None
        self._running = False

    def before(self, step: int) -> bool:
        """Called before each step; returns whether a trace was completed by this call."""
        if not self.steps:
            return False
        if self._start is None:
            self._start = step + 2
        if step == self._start:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        return step == self._start + self.steps and self.close()

    def close(self) -> bool:
        """Writes a trace that is running, if there is one (the run ends or stops); returns whether there was."""
        if not self._running:
            return False
        self._running = False
        jax.profiler.stop_trace()
        return True
