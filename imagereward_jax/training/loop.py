"""The loop that every method trains in: data, step, evaluation, checkpoints, metrics, report."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagereward_jax.compilation_cache import counting_hits
from imagereward_jax.methods.base import ImageSamples
from imagereward_jax.models.param_tree import join
from imagereward_jax.storage.errors import writing
from imagereward_jax.terminal import say
from imagereward_jax.training.baseline import Baseline
from imagereward_jax.training.checkpoints import Checkpoints, exports_best, goodness
from imagereward_jax.training.export import chosen_by, write_ending, write_export
from imagereward_jax.training.finite import require_finite, skipped_too_often
from imagereward_jax.training.html_report import write_report
from imagereward_jax.training.interruptions import Interrupted, catch_signals, closing, signal_of_any, wait_for_all
from imagereward_jax.training.mesh import check_batch, check_remat, from_all_processes, make_mesh, put_batch
from imagereward_jax.training.metric_writers import Meter, MetricWriter, check_installed, listed, make_writers
from imagereward_jax.training.profiler import Profiler
from imagereward_jax.training.program import AssembledRun, TrainingProgram
from imagereward_jax.training.progress import Progress, described, started, waiting
from imagereward_jax.training.resume import locked, newest_whole, read_state
from imagereward_jax.training.samples import save_samples
from imagereward_jax.training.state import to_checkpoint
from imagereward_jax.training.step import cast, join_models, over_updates
from imagereward_jax.training.watch import Watch, check_best, check_measured
from imagereward_jax.training.workdir import STARTED, begin, check_export, check_workdir, is_complete, read_done

SamplesHook = Callable[[ImageSamples, int, dict[str, MetricWriter]], None]


def train(
    config: Any,
    assemble: Callable[[Any, Mesh], AssembledRun],
    workdir: str | Path,
    *,
    image_samples_hook: SamplesHook | None = None,
    started_by: str = "",
) -> bool:
    """Trains what `assemble(config, mesh)` makes in `workdir`, from its latest checkpoint if there is one.

    Args:
        config: a validated config. assemble: see `assembly.run.assemble`.
        workdir: folder; made if absent.
        image_samples_hook: called in process 0 as (samples, step, writers) after every evaluation that samples, and
            after the steps of on-policy methods whose sources keep their samples.
        started_by: the command that started the run, for its report.

    Returns:
        False if the run was complete already.

    Raises:
        WorkdirError: the workdir belongs to another run, or cannot be written.
        LockedError: another process trains in the workdir.
        WriteError, CheckpointError: the disk is full, say; the latest whole checkpoint stays.
        ConfigError: config.stop.judge or config.eval.best is not among the metrics of the evaluation.
        RunError: too many updates in a row were not finite, or the weights are not; no checkpoint holds such.
        ProcessLost: another process of the run ended.
        Interrupted: after a signal; everything is saved.
    """
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch(mesh, config.batch_size, config.accumulation)
    check_remat(mesh, config.model.remat)
    check_workdir(workdir, config)
    if is_complete(workdir, config):
        return False
    check_installed(config.writers)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(workdir)) if workdir.is_dir() else None
        wait_for_all("checked the workdir")  # before process 0 writes into it
        if jax.process_index() == 0:
            say(f"{config.method.name}: opening {config.model.get('path') or 'its parts'}", file=sys.stderr)
        run = assemble(config, mesh)  # before anything is written: a bad path leaves no workdir behind
        check_measured(config, run.method.evaluate.values())
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        lock = lock or stack.enter_context(locked(workdir))
        check_workdir(workdir, config)  # again: another run may have begun and ended meanwhile
        if run.export is not None:
            check_export(workdir, run.export.marker)
        if jax.process_index() == 0:
            begin(workdir, config, {**run.files, STARTED: json.dumps(started(run, mesh, started_by), indent=2)})
        keep = 1 if config.checkpoint.best_only else config.checkpoint.keep
        best = dict.fromkeys(name for name in (config.eval.best, config.stop.judge) if name)
        manager = Checkpoints(workdir / "checkpoints", keep=keep, best=tuple(best))
        progress = Progress(config, run.method, main=jax.process_index() == 0)
        caught = stack.enter_context(catch_signals(progress.answer))
        stack.enter_context(closing(manager))
        loop = _Loop(config, run, workdir, mesh, manager, caught, image_samples_hook, lock, progress)
        with contextlib.ExitStack() as writers:
            for writer in loop.writers.values():
                writers.callback(writer.close)
            loop.run()
    return True


class _Loop:
    """One process's part of a run, from restoring to the report."""

    def __init__(self, config, run, workdir, mesh, manager, caught, hook, lock, progress):
        self.config, self.workdir, self.mesh, self.manager, self.caught = config, workdir, mesh, manager, caught
        self.assembled, self.method, self.hook, self.lock = run, run.method, hook, lock
        self.main = jax.process_index() == 0
        self.progress = progress
        self.program, self.compiled = TrainingProgram(config, run, mesh), {}
        self.fixed = self.program.fixed(run)
        self.state = self.program.initial_state(run.trainable)
        run.trainable = run.reference_of = None  # the state has a copy; these would keep the first on the devices
        self.progress.say(described(config, mesh, self.state.params, run.frozen, workdir))
        self.watch = Watch(config.stop)
        self.baseline = Baseline(workdir, config, main=self.main)
        dtype = jnp.dtype(config.dtype)

        def cast_weights(tree):
            return cast(tree, dtype)

        self._cast = jax.jit(cast_weights)  # once: a new function would be compiled at every evaluation
        self.meter = Meter()
        self.profiler = Profiler(workdir / "profile", config.profile.steps)
        self.step = self._restore()
        ended = (read_done(workdir) or {}).get("step")
        self.writers = make_writers(config.writers, workdir, last_step=self.step, ended=ended) if self.main else {}

    def _restore(self):
        if self.manager.steps() and self.baseline.outdated:
            self.progress.say(f"{self.baseline.outdated}: sampling what was before the first step again, for drift")
            self.baseline.keep(self._evaluate()[1])
        step = newest_whole(self.manager, self._take_over, self.progress.say)
        if step is not None:
            self.progress.say(f"continuing from step {step}")
            self.progress.step = self.progress.saved = step
        return step

    def _take_over(self, step):
        self.state, loop = read_state(self.manager, self.program, step)
        self.meter.set_state(loop["meter"])
        self.watch.set_state(loop.get("watch", {}))  # runs of before have none
        for phase in self.method.phases:
            phase.source.set_state(loop["streams"])

    def run(self):
        """From the first evaluation to the report."""
        self.positions = self._positions()
        if self.step is None:
            self.step = 0
            with self.progress.during("evaluating"):
                metrics = self._evaluate_and_log({})
            if self.config.stop.judge:
                self._save(metrics)  # the judge may find nothing better
            self._stop_if_asked()
        self.iterators = self._iterators()
        try:
            if not self._ended:
                begin = time.monotonic()
                self.batches = self._next_batches()
                self.waited = time.monotonic() - begin
                self._program_for(self.batches)
            stage = "training" if self.program.updates == 1 and not self.program.on_policy else "on policy"
            with self.progress.bar(self.step) as bar, self.progress.during(stage):
                while not self._ended:
                    self._stop_if_asked()
                    self._advance(bar)
        finally:
            for iterator in self.iterators.values():
                iterator.close()
            if self.profiler.close():
                self.progress.say(f"profile in {self.profiler.folder}")
        self._save({})
        if self.watch.stopped:
            self.progress.say(f"stopped at step {self.step}: {self.watch.stopped}")
        with self.progress.during("exporting"):
            exported = self._export()
        if self.main:
            write_ending(self.workdir, self.config, self.step, exported, self.watch.stopped)
        self.progress.say(f"done: {self.workdir / 'report.html'}")

    @property
    def _ended(self):
        return self.step >= self.config.steps or bool(self.watch.stopped)

    def _program_for(self, batches):
        """The compiled step for batches of these shapes, of which there are several if images have several sizes."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batches))
        if shapes not in self.compiled:
            with self.progress.during("compiling"):
                self.compiled[shapes] = self._compile(batches)
        return self.compiled[shapes]

    def _compile(self, batches):
        start = time.monotonic()
        with waiting("tracing the training step", main=self.main):
            lowered = self.program.jitted().lower(self.state, self.fixed, batches, np.int32(0))
        self.progress.say(f"traced the training step in {time.monotonic() - start:.1f} s, compiling it")
        start = time.monotonic()
        with waiting("compiling the training step", main=self.main), counting_hits() as hits:
            compiled = lowered.compile(self.program.compile_options)
        done = "read the compiled training step from the cache" if hits else "compiled the training step"
        self.progress.say(f"{done} in {time.monotonic() - start:.1f} s")
        return compiled

    def _positions(self):
        states = [phase.source.get_state() for phase in self.method.phases]
        return {name: state for part in states for name, state in part.items()}

    def _iterators(self):
        key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
        return {
            phase.name: self._iterator(phase.source, jax.random.fold_in(key, index))
            for index, phase in enumerate(self.method.phases)
        }

    def _iterator(self, source, key):
        if not source.on_policy:
            yield from source.batches(None, key)
        while True:  # every step's from the weights that it begins with; no name holds them while they are updated
            yield from source.batches(
                join_models(self.fixed, self.state.params, self.state.copies, self._cast),
                jax.random.fold_in(key, self.step),
            )

    def _next_batches(self):
        found = {}
        for name, iterator in self.iterators.items():
            while (batch := next(iterator)) is None:
                self._stop_if_asked()
            found[name] = put_batch(self.mesh, batch)
        return found

    def _updates(self):
        """Makes the updates of a step; returns the metrics of each."""
        found = []
        for update in range(self.program.updates):
            if update:
                jax.block_until_ready(found[: update - 1])  # one waits behind the one that runs, not all of them
                self._stop_if_asked(within_step=True)
            batches, self.batches = self.batches or self._next_batches(), None
            program = self._program_for(batches)
            self.state, metrics = program(self.state, self.fixed, batches, np.int32(update))
            found.append(metrics)
        return found

    def _advance(self, bar):
        config, begin, self.waited = self.config, time.monotonic() - self.waited, 0.0
        if self.profiler.before(self.step):
            self.progress.say(f"profile of {config.profile.steps} steps in {self.profiler.folder}")
        metrics = self._updates()
        self.progress.step = self.step = self.step + 1
        self.positions = self._positions()
        if self.step < config.steps and not self.program.on_policy:
            self.batches = self._next_batches()  # while the devices are busy with this step
        metrics = over_updates(jax.device_get(metrics))
        skipped_in_row = int(metrics.pop("skipped_in_row"))
        for phase in self.method.phases:
            metrics |= {f"{phase.name}/{name}": value for name, value in phase.source.metrics.items()}
        images = self.method.phases[0].source.images * self.program.updates
        metrics["images_per_second"] = images / (time.monotonic() - begin)
        metrics["learning_rate"] = self.program.learning_rate(self.step)
        metrics["images"] = images * self.step
        self.meter.add(metrics)
        for phase in self.method.phases:
            self._show_samples(phase.source.samples)
        self.progress.show(bar, self.step, metrics)
        if skipped_in_row >= config.max_skipped:
            self._give_up(skipped_in_row, metrics)
        last = self.step == config.steps
        row = self.meter.pop() if last or self.step % config.log_every == 0 else {}
        if last or self.step % config.eval.every == 0:
            with self.progress.during("evaluating"):
                self._save(self._evaluate_and_log(row))
        else:
            self._log(row)
            if self.step % config.checkpoint.every == 0:
                self._save({})

    def _components(self, state):
        """Every component, averaged and in the compute dtype, as evaluators take them."""
        return join(self.fixed.frozen, self._cast(state.averaged))

    def _evaluate(self):
        """(evaluations, embeddings of the images by the names of drifts)"""
        components, embeds = self._components(self.state), {}
        evaluations = [evaluator(components) for evaluator in self.method.evaluate.values()]
        for evaluation in evaluations:
            embeds |= evaluation.embeds
        return evaluations, embeds

    def _evaluate_and_log(self, row):
        require_finite(self.state, self.step, self.manager)
        evaluations, embeds = self._evaluate()
        if self.step == 0:
            self.baseline.keep(embeds)
        metrics, errors = {}, {}
        for index, evaluation in enumerate(evaluations):
            metrics, errors = {**metrics, **evaluation.metrics}, {**errors, **evaluation.errors}
            if self.main:
                save_samples(self.workdir, self.step, index, evaluation)
            if self.main and evaluation.sheet is not None:
                for writer in self.writers.values():
                    writer.write_images(self.step, "samples", np.asarray(evaluation.sheet.convert("RGB")))
            self._show_samples(evaluation.samples)
        metrics |= self.baseline.drift(embeds)
        metrics, errors = from_all_processes([metrics, errors])[0]  # all decide by the same numbers
        self._log({**row, **metrics})
        if self.main:
            write_report(self.workdir)
        if metrics:
            self.progress.say(f"step {self.step}: {listed(metrics)}")
        if exports_best(self.config):
            check_best(self.config, metrics)
        for line in self.watch.update(self.step, metrics, errors):
            self.progress.say(f"warning: {line}: images may please the reward alone, see docs/watch.md")
        return metrics

    def _show_samples(self, samples):
        if self.main and self.hook is not None and samples is not None:
            self.hook(samples, self.step, self.writers)

    def _log(self, row):
        if row:
            for writer in self.writers.values():
                writer.write(self.step, row)

    def _save(self, evaluation, *, always=False):
        """Saves the state; with `best_only` nothing but the best evaluated so far, unless `always`."""
        require_finite(self.state, self.step, self.manager)
        if self.config.checkpoint.best_only and not (always or self._is_best(evaluation)):
            return
        loop = {
            "meter": self.meter.get_state(),
            "streams": self.positions,
            "watch": self.watch.get_state(),
            "config": json.loads(self.config.to_json()),
        }
        self.manager.save(self.step, to_checkpoint(self.state), loop, metrics=evaluation or None)
        self.progress.saved = self.step

    def _is_best(self, evaluation):
        """Whether it is better than every checkpoint, by config.eval.best or config.stop.judge."""
        found = {name: self.manager.best(name) or (-math.inf, 0) for name in self.manager.ranked_by}
        return any(goodness(evaluation, name) > value for name, (value, _) in found.items())

    def _stop_if_asked(self, *, within_step=False):
        """Stops after a signal; a step that made some of its updates is thrown away, back to the latest checkpoint.

        Also stops if another host took the workdir over.
        """
        self.lock.check()
        if signum := signal_of_any(self.caught):
            if not within_step:
                self._save({}, always=True)
            self.manager.wait()
            raise Interrupted(signum, self.manager.latest() or 0)

    def _give_up(self, skipped, metrics):
        self.state = self.state.replace(skipped_in_row=jnp.zeros_like(self.state.skipped_in_row))
        self._save({}, always=True)
        self.manager.wait()
        rewards = [name for name in metrics if name.startswith(self.method.shown or "-")]
        broken = [name for name in rewards if not np.isfinite(metrics[name])]
        kept, reward = self.manager.folder / str(self.step), self.config.get("reward", {}).get("path")
        raise skipped_too_often(skipped, kept, broken, reward)

    def _exported_state(self):
        """(state, step) to export."""
        best = chosen_by(self.config, self.watch.stopped)
        _, step = (best and self.manager.best(best)) or (None, self.step)
        if step == self.step:
            return self.state, step
        self.progress.say(f"exporting the best checkpoint by {best}, of step {step}")
        return read_state(self.manager, self.program, step)[0], step

    def _export(self):
        """Writes the export; returns the step that it is of."""
        self.manager.wait()
        state, step = self._exported_state()
        if self.method.test is not None:
            metrics = self.method.test(self._components(state))
            self._log(metrics)
            self.progress.say(listed(metrics))
        self.progress.say(f"exporting to {self.workdir / 'export'}")
        weights = join(self.fixed.frozen, state.averaged)
        write_export(self.workdir, self.config, self.assembled, weights, step)
        return step
