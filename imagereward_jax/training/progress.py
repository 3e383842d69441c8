"""What a run says on stderr while it trains: a bar, and lines above it."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm  # a widget in notebooks

from imagereward_jax.methods.base import Method
from imagereward_jax.terminal import escape
from imagereward_jax.training.interruptions import stopping

EVERY = 5.0  # seconds between two signs of life while nothing else shows
LONG = 600.0  # seconds of an evaluation that a user is told of before they pass


class Progress:
    """The bar and the lines of one process; all but the main one are silent.

    Args:
        config: the run's config. method: names the metrics that are shown and those that are warned of.
        main: whether this is process 0.

    Attributes:
        stage: what goes on, see `during`. step: the last that is done. saved: that of the latest checkpoint, or None.
    """

    def __init__(self, config: Any, method: Method, *, main: bool):
        self.config, self.method, self.main = config, method, main
        self._warned: set[str] = set()
        self.stage, self.step, self.saved = "opening", 0, None

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Notes what goes on, one of `interruptions.STOPS`, for `answer`."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    def answer(self) -> None:
        """Says what a signal that came just now makes the run do."""
        self.say(stopping(self.stage, self.step, self.saved))

    def bar(self, step: int) -> tqdm:
        """A bar that stands at `step`."""
        return tqdm(
            total=self.config.steps,
            initial=step,
            desc=self.config.method.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.main,
            file=sys.stderr,
        )

    def show(self, bar: tqdm, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar on to `step`; warns of a metric that exceeds its limit for the first time."""
        note = {"loss": f"{metrics[self.method.phases[0].name + '/loss']:.3g}"}
        if self.method.shown:
            note = {"reward": f"{metrics[self.method.shown]:.3f}", **note}
        note["img/s"] = f"{metrics['images_per_second']:.3g}"
        if metrics["skipped"]:
            note["skipped"] = int(metrics["skipped"])
        bar.set_postfix(note, refresh=False)
        bar.update()
        for name, (limit, meaning) in self.method.limits.items():
            if metrics[name] > limit and name not in self._warned:
                self._warned.add(name)
                self.say(f"warning: step {step}: {name} {metrics[name]:.3g} is above {limit:g}: {meaning}")

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        if self.main:
            tqdm.write(escape(text), file=sys.stderr)


@contextlib.contextmanager
def waiting(what: str, *, main: bool) -> Iterator[None]:
    """Says every few seconds, in a line that goes away again, that `what` goes on, and for how long.

    Args:
        main: whether this is process 0; all others are silent.
    """
    ended = threading.Event()

    def tell():
        begin, clock = time.monotonic(), tqdm(bar_format="{desc}", leave=False, file=sys.stderr)
        while not ended.wait(EVERY):
            clock.set_description_str(f"{what}: {time.monotonic() - begin:.0f} s")
        clock.close()

    if not main:
        yield
        return
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def foretelling(
    update: Callable[[int], Any],
    total: int,
    advise: Callable[[int, float], Any],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[int], None]:
    """Wraps the `update` of a bar over `total` items: calls `advise` once if the rest will take longer than `LONG`.

    That is known after the second batch; what the first one takes is left out, because it compiles.

    Args:
        advise: takes `total`, and the seconds for that many.
    """
    done, first, begin = 0, 0, None

    def counted(items):
        nonlocal done, first, begin
        update(items)
        done += items
        if begin is None:
            first, begin = items, clock()
        elif done - items == first and (clock() - begin) * (total - done) / items > LONG:
            advise(total, (clock() - begin) * total / items)

    return counted


def started(run: Any, mesh: Mesh, command: str) -> dict[str, Any]:
    """What a run's config does not say, for its report: number of parameters, devices, the command that started it."""
    return {
        "command": command,
        "trained": {name: _size(tree) for name, tree in run.trainable.items()},
        "frozen": _size(run.frozen),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    }


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def described(config: Any, mesh: Mesh, trained: Any, frozen: Any, workdir: Path) -> str:
    """What a run is about to do, in one line: method, model, what trains, batch, devices, workdir."""
    sizes = _size(trained), _size(frozen)
    kind = mesh.devices.flat[0].device_kind
    model = config.model.get("path") or "a model from scratch"
    return (
        f"{config.method.name} of {model}: {sizes[0]:,} parameters train beside {sizes[1]:,} that do not; batches of "
        f"{config.batch_size} on {mesh.size} x {kind} (data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}); {workdir}"
    )
