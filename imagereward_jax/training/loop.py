"""The loop that every method trains in: data, step, evaluation, checkpoints, metrics, report."""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from imagereward_jax.storage.files import save_image, write_text
from imagereward_jax.storage.folders import new_folder
from imagereward_jax.training import checkpoints as ckpt
from imagereward_jax.training.html_report import write_report
from imagereward_jax.training.mesh import check_batch, check_remat, make_mesh, put_batch, replicated, weight_shardings
from imagereward_jax.training.metric_writers import Meter, make_writers
from imagereward_jax.training.optimizer import make_optimizer
from imagereward_jax.training.step import cast, compile_options, init_state, make_train_step
from imagereward_jax.training.workdir import CONFIG, DONE, check_workdir, is_complete

# How collectives over TCP (gloo), NCCL and jax's coordination service say that a peer is gone.
SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo", "NCCL", "UNAVAILABLE")


class RunError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


class ProcessLost(RuntimeError):
    """Another process of this run ended, so that this one cannot go on; the message says so and what to do.

    Raised where a collective operation fails. Where a process has several devices that wait for each other, it may not
    fail: then jax ends the process after 100 s, saying "another task died", unless a launcher did so before.
    """


class Interrupted(Exception):
    """SIGTERM or Ctrl-C stopped the run after saving; `signum` says which."""

    def __init__(self, signum, step):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} at step {step}; the same command continues from there"
        )
        self.signum = signum


@dataclasses.dataclass
class Evaluation:
    """What an evaluation found: numbers by name ("eval/..."), and a sheet of samples (PIL image) or None."""

    metrics: dict
    sheet: Any = None


@dataclasses.dataclass
class Experiment:
    """A method with its parts, ready to be trained.

    Attributes:
        trainable: weights that train, {network: nested dict}; float32.
        frozen: the other weights that the losses read; in the compute dtype.
        phases: the losses, each with an update of its own, in order.
        streams: {name: iterator of batches (nested dicts of numpy arrays) with get_state and set_state}.
        evaluate: (trainable, frozen) -> Evaluation; arrays are on the mesh, trainable in the compute dtype.
        export: (trainable as numpy, empty folder) -> None.
        export_marker: a file that every export of this kind holds.
        test: (trainable, frozen) -> metrics ("test/...") of what is exported, once at the end, or None.
        images_per_step: how many pictures a step trains on, for images/s.
        reward_metric: the metric that the progress bar calls reward, or None.
    """

    trainable: dict
    frozen: dict
    phases: tuple
    streams: dict
    evaluate: Callable
    export: Callable
    images_per_step: int
    reward_metric: str | None = None
    export_marker: str = "model_index.json"
    test: Callable | None = None


def train(config, build, workdir):
    """Trains `build(config, mesh)` in `workdir`, from its latest checkpoint if there is one.

    Args:
        config: a validated config. build: makes the `Experiment`.
        workdir: folder; made if absent.

    Returns:
        False if the run was complete already.

    Raises:
        WorkdirError: the workdir belongs to another run.
        RunError: too many updates in a row were not finite.
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
    _together("checked the workdir")  # before process 0 writes into it
    experiment = build(config, mesh)  # before anything is written: a bad path leaves no workdir behind
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        write_text(workdir / CONFIG, json.dumps(json.loads(config.to_json()), indent=2))
    keep = 1 if config.checkpoint.best_only else config.checkpoint.keep
    manager = ckpt.Checkpoints(workdir / "checkpoints", keep=keep, best=config.eval.best)
    with _closing(manager), catch_signals() as caught:
        _Run(config, experiment, workdir, mesh, manager, caught).run()
    return True


@contextlib.contextmanager
def _closing(manager):
    """Closes the checkpoints at the end, unless a process is gone: that would wait for it.

    Raises:
        ProcessLost: a collective operation failed in a run of several processes.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() > 1 and any(sign in str(error) for sign in SIGNS_OF_LOSS):
            reason = str(error).splitlines()[0][:200]
            raise ProcessLost(
                f"process {jax.process_index()} of {jax.process_count()} lost another process of this run ({reason}); "
                "start them all again with the same command: the run continues from its latest checkpoint"
            ) from error
        manager.close()
        raise
    except BaseException:
        manager.close()
        raise
    manager.close()


def _together(name):
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"imagereward_jax train: {name}")


@contextlib.contextmanager
def catch_signals():
    """A list that SIGTERM and SIGINT append to; a second Ctrl-C interrupts at once."""
    caught = []

    def handle(signum, frame):
        if caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)

    old = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


class _Run:
    """One process's part of a run, from restoring to the report."""

    def __init__(self, config, experiment, workdir, mesh, manager, caught):
        self.config, self.experiment, self.workdir, self.manager, self.caught = (
            config,
            experiment,
            workdir,
            manager,
            caught,
        )
        self.mesh = mesh
        self.dtype = jnp.dtype(config.dtype)
        self.main = jax.process_index() == 0
        self.optimizer = make_optimizer(config.optimizer, config.steps * len(experiment.phases), config.batch_size)
        self.meter = Meter()
        self.state = self._initial_state()
        experiment.trainable = None  # the state holds it now
        self.frozen = jax.device_put(experiment.frozen, weight_shardings(mesh, experiment.frozen))
        self.step = self._restore()
        self.writers = make_writers(config.writers, workdir, last_step=self.step) if self.main else {}
        self.bar_note = {}

    def _initial_state(self):
        trainable = jax.device_put(self.experiment.trainable, weight_shardings(self.mesh, self.experiment.trainable))

        def make(params):
            return init_state(params, self.optimizer, seed=self.config.seed, ema=self.config.ema_decay > 0)

        self.shardings = weight_shardings(self.mesh, jax.eval_shape(make, trainable))
        return jax.jit(make, out_shardings=self.shardings)(trainable)

    def _restore(self):
        step = self.manager.latest()
        if step is None:
            return None
        self.state, loop = self.manager.restore(step, ckpt.abstract(self.state, self.shardings))
        self.meter.set_state(loop["meter"])
        for name, stream in self.experiment.streams.items():
            stream.set_state(loop["streams"][name])
        self._say(f"continuing from step {step}")
        return step

    def run(self):
        """From the first evaluation to the report."""
        config = self.config
        if self.step is None:
            self.step = 0
            self._evaluate_and_log({})
        self.positions = self._positions()
        if self.step < config.steps:
            self.batches = self._next_batches()
            self.train_step = self._compile()
        with self._bar() as bar:
            while self.step < config.steps:
                self._stop_if_asked()
                self._advance(bar)
        self._save({})
        self._export()
        if self.main:
            write_report(self.workdir)
            write_text(self.workdir / DONE, json.dumps({"step": self.step}))
            for writer in self.writers.values():
                writer.close()
        self._say(f"done: {self.workdir / 'report.html'}")

    def _compile(self):
        step = make_train_step(
            self.experiment.phases,
            self.optimizer,
            dtype=self.dtype,
            accumulation=self.config.accumulation,
            ema_decay=self.config.ema_decay,
            mesh=self.mesh,
        )
        start = time.monotonic()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
        lowered = jitted.lower(self.state, self.frozen, self.batches)
        compiled = lowered.compile(compile_options(self.config.optimization_level))
        self._say(f"compiled the training step in {time.monotonic() - start:.1f} s")
        return compiled

    def _positions(self):
        return {name: stream.get_state() for name, stream in self.experiment.streams.items()}

    def _next_batches(self):
        return {name: put_batch(self.mesh, next(stream)) for name, stream in self.experiment.streams.items()}

    def _advance(self, bar):
        config, begin = self.config, time.monotonic()
        self._profile()
        self.state, metrics = self.train_step(self.state, self.frozen, self.batches)
        self.step += 1
        self.positions = self._positions()
        if self.step < config.steps:
            self.batches = self._next_batches()  # while the devices are busy with this step
        metrics = jax.device_get(metrics)
        skipped_in_row = int(metrics.pop("skipped_in_row"))
        metrics["images_per_second"] = self.experiment.images_per_step / (time.monotonic() - begin)
        self.meter.add(metrics)
        self._show(bar, metrics)
        if skipped_in_row >= config.max_skipped:
            self._give_up(skipped_in_row)
        last = self.step == config.steps
        row = self.meter.pop() if last or self.step % config.log_every == 0 else {}
        if last or self.step % config.eval.every == 0:
            evaluation = self._evaluate_and_log(row)
            self._save(evaluation)
        else:
            self._log(row)
            if self.step % config.checkpoint.every == 0:
                self._save({})

    def _evaluate_and_log(self, row):
        averaged = jax.jit(lambda tree: cast(tree, self.dtype))(self.state.averaged)
        evaluation = self.experiment.evaluate(averaged, self.frozen)
        self._log({**row, **evaluation.metrics})
        if self.main and evaluation.sheet is not None:
            save_image(self.workdir / "samples" / f"step_{self.step:07d}.png", evaluation.sheet)
            for writer in self.writers.values():
                writer.write_images(self.step, "samples", np.asarray(evaluation.sheet.convert("RGB")))
        if self.main:
            write_report(self.workdir)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        self._say(f"step {self.step}: {numbers}")
        return evaluation.metrics

    def _log(self, row):
        if row:
            for writer in self.writers.values():
                writer.write(self.step, row)

    def _save(self, evaluation, *, always=False):
        """Saves the state; with `best_only` nothing but the best evaluated so far, unless `always`."""
        if self.config.checkpoint.best_only and not (always or self._is_best(evaluation)):
            return
        loop = {
            "meter": self.meter.get_state(),
            "streams": self.positions,
            "config": json.loads(self.config.to_json()),
        }
        self.manager.save(self.step, self.state, loop, metrics=evaluation or None)

    def _is_best(self, evaluation):
        if not evaluation:
            return False
        best = self.manager.best_metrics()
        name = self.config.eval.best
        return best is None or ckpt.goodness(evaluation, name) > ckpt.goodness(best, name)

    def _stop_if_asked(self):
        caught = self.caught[-1] if self.caught else 0
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            caught = int(multihost_utils.process_allgather(np.int32(caught)).max())
        if caught:
            self._save({}, always=True)
            self.manager.wait()
            raise Interrupted(caught, self.step)

    def _give_up(self, skipped):
        self.state = self.state.replace(skipped_in_row=jnp.zeros_like(self.state.skipped_in_row))
        self._save({}, always=True)
        self.manager.wait()
        raise RunError(
            f"{skipped} updates in a row had gradients that are not finite (config.max_skipped): the weights of the "
            f"last good update are in {self.manager.folder / str(self.step)}. Lower config.optimizer.learning_rate, or "
            "use config.dtype='float32', and start in another --workdir"
        )

    def _exported_state(self):
        """The state to export: the last, or as config.checkpoint says that of the best evaluation."""
        best, settings = self.manager.best(), self.config.checkpoint
        if (settings.export == "last" and not settings.best_only) or best in (None, self.step):
            return self.state
        self._say(f"exporting the best checkpoint, of step {best}")
        return self.manager.restore(best, ckpt.abstract(self.state, self.shardings))[0]

    def _export(self):
        self.manager.wait()
        state = self._exported_state()
        if self.experiment.test is not None:
            metrics = self.experiment.test(jax.jit(lambda tree: cast(tree, self.dtype))(state.averaged), self.frozen)
            self._log(metrics)
            self._say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        averaged = jax.jit(lambda tree: tree, out_shardings=replicated(self.mesh))(state.averaged)
        weights = jax.device_get(averaged)
        if self.main:
            self._say(f"exporting to {self.workdir / 'export'}")
            marker = self.experiment.export_marker
            with new_folder(self.workdir / "export", overwrite=True, marker=marker) as folder:
                self.experiment.export(weights, folder)

    def _profile(self):
        steps = self.config.profile.steps
        if not steps:
            return
        self._profile_start = getattr(self, "_profile_start", self.step + 2)
        if self.step == self._profile_start:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        elif self.step == self._profile_start + steps:
            jax.profiler.stop_trace()
            self._say(f"profile of {steps} steps in {self.workdir / 'profile'}")

    def _bar(self):
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.config.method.name,
            unit="step",
            dynamic_ncols=True,
            disable=not self.main,
            file=sys.stderr,
        )

    def _show(self, bar, metrics):
        note = {"loss": f"{metrics[self.experiment.phases[0].name + '/loss']:.3g}"}
        if self.experiment.reward_metric:
            note = {"reward": f"{metrics[self.experiment.reward_metric]:.3f}", **note}
        note["img/s"] = f"{metrics['images_per_second']:.3g}"
        if metrics["skipped"]:
            note["skipped"] = int(metrics["skipped"])
        bar.set_postfix(note, refresh=False)
        bar.update()

    def _say(self, text):
        if self.main:
            tqdm.write(text, file=sys.stderr)
