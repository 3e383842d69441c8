"""The loop: what a run leaves, and that interruptions of every kind lose nothing."""

import dataclasses
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

ocp = pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

import child
from toy import assemble_toy, main, toy_config, train

from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import Evaluation, ImageSamples
from imagereward_jax.storage.errors import WriteError
from imagereward_jax.training import loop, program
from imagereward_jax.training.checkpoints import CheckpointError
from imagereward_jax.training.interruptions import Interrupted, RunError
from imagereward_jax.training.metric_writers import Meter, read_rows
from imagereward_jax.training.optimizer import make_optimizer, make_schedule
from imagereward_jax.training.workdir import WorkdirError

TIMES = ("time", "images_per_second")


def in_process(*arguments, devices=1):
    """Runs toy.py in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "toy.py"), *map(str, arguments)]
    return subprocess.run(command, env=child.environment(devices), capture_output=True, text=True, timeout=300)


def numbers(workdir):
    """The rows of metrics.jsonl without the clock's."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir / "metrics.jsonl")]


def test_the_learning_rate_is_logged_as_it_stands(tmp_path, capsys):
    """That of the last update before the row, of two a step; and the run says first what it is about to do."""
    config = toy_config()
    config.optimizer.schedule, config.optimizer.warmup_steps, config.log_every = "linear", 2, 3
    assert loop.train(config, assemble_toy, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "learning_rate" in row]
    schedule = make_schedule(config.optimizer, 2 * config.steps, config.batch_size)
    assert [row["learning_rate"] for row in rows] == [float(schedule(2 * row["step"] - 1)) for row in rows]
    assert len(rows) > 3
    said = capsys.readouterr().err
    assert re.search(
        r"parameters train beside [\d,]+ that do not; batches of \d+ on \d+ x \w+ \(data \d, fsdp 1\)", said
    )


def test_a_run_leaves_what_the_design_lists(clean):
    assert {path.name for path in clean.iterdir()} == {
        "config.json", "started.json", "done.json", "metrics.jsonl", "samples", "checkpoints", "export", "report.html"
    }  # fmt: skip
    rows = read_rows(clean / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert all("time" in row for row in rows)
    assert [row["step"] for row in rows if "eval/good" in row] == [0, 10, 20]
    assert sorted(path.name for path in (clean / "samples").iterdir()) == [
        f"step_{step:07d}.png" for step in (0, 10, 20)
    ]
    page = (clean / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 3 and "<svg" in page and "://" not in page


def test_a_second_run_says_that_it_is_complete(clean, capsys):
    before = (clean / "metrics.jsonl").read_bytes()
    assert main(str(clean)) == 0
    assert "complete" in capsys.readouterr().out
    assert (clean / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("die_at", [3, 13])
def test_killed_and_restarted_equals_never_stopped_bit_for_bit(clean, tmp_path, die_at):
    workdir = tmp_path / "run"
    killed = in_process(workdir, f"--fault.die_at={die_at}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (workdir / "export").exists()
    assert main(str(workdir)) == 0
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), np.load(clean / "export/w.npy"))
    assert numbers(workdir) == numbers(clean)


def test_sigterm_saves_and_the_restart_equals_never_stopped(clean, tmp_path):
    config, workdir = toy_config(), tmp_path / "run"
    with pytest.raises(Interrupted, match="SIGTERM at step 6; the same command continues") as stopped:
        train(config, functools.partial(assemble_toy, terminate_at=7), workdir)
    assert stopped.value.signum == signal.SIGTERM
    assert (workdir / "checkpoints/6").is_dir()
    assert main(str(workdir)) == 0
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), np.load(clean / "export/w.npy"))
    assert numbers(workdir) == numbers(clean)


def test_a_longer_run_continues_and_exports_again(tmp_path):
    assert main(str(tmp_path / "run"), "--optimizer.warmup_steps=0", "--steps=8") == 0
    first = np.load(tmp_path / "run/export/w.npy")
    assert main(str(tmp_path / "run"), "--steps=12") == 0
    assert numbers(tmp_path / "run")[-1]["step"] == 12
    assert not np.array_equal(first, np.load(tmp_path / "run/export/w.npy"))


def test_non_finite_updates_are_skipped_and_counted(tmp_path):
    config = toy_config()
    train(config, functools.partial(assemble_toy, nan_from=4, nan_until=5), tmp_path / "run")
    assert numbers(tmp_path / "run")[-1]["skipped"] == 2  # both phases of one step
    assert np.isfinite(np.load(tmp_path / "run/export/w.npy")).all()


def test_too_many_non_finite_updates_stop_the_run_with_good_weights(tmp_path):
    config = toy_config()
    with pytest.raises(RunError, match="4 updates in a row") as stopped:
        train(config, functools.partial(assemble_toy, nan_from=4, nan_until=99), tmp_path / "run")
    assert re.search(
        r"checkpoints/6; config.reward gave scores that were not finite \(refl/reward\)", str(stopped.value)
    )
    assert numbers(tmp_path / "run")[-1]["step"] == 3
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 20


def spoilt_from(update):
    """`make_optimizer`, whose result has one infinite number from this update on, in the largest array alone."""

    def make(config, updates, batch_size):
        adamw = make_optimizer(config, updates, batch_size)

        def spoil(grads, state, params):
            changes, inner = adamw.update(grads, state[1], params)
            big = changes["net"]["big"]
            big = big.at[7, 7].set(jax.numpy.where(state[0] < update, big[7, 7], np.inf))
            return {"net": {**changes["net"], "big": big}}, (state[0] + 1, inner)

        return optax.GradientTransformation(lambda params: (np.int32(0), adamw.init(params)), spoil)

    return make


@pytest.mark.parametrize(
    ("settings", "update", "steps", "said"),
    [
        ({"checkpoint.every": 1}, 11, [5], "after step 6 2 arrays .*'big'.* the last good weights are in .*/5;"),
        ({"max_skipped": 3}, 9, [4], "after step 7 2 arrays .*'big'.* the last good weights are in .*/4;"),
        ({"eval.every": 1, "checkpoint.best_only": True}, 0, [], "after step 1 .*there is no checkpoint of before;"),
    ],
    ids=["seen when it is saved", "seen when updates are skipped", "seen when it is evaluated"],
)
def test_a_large_array_alone_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, settings, update, steps, said):
    """A step has two updates; the smallest array, which the step looks at, stays finite."""
    monkeypatch.setattr(program, "make_optimizer", spoilt_from(update))
    with pytest.raises(RunError, match=said):
        train(toy_config(**settings, **{"checkpoint.keep": 1}), assemble_toy, tmp_path / "run")
    assert [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()] == steps
    for step in steps:
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(tmp_path / f"run/checkpoints/{step}/state")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    assert not (tmp_path / "run/export").exists()


def test_the_workdir_of_another_run_is_refused(clean):
    with pytest.raises(WorkdirError, match=r"config\.seed: 0 there, 1 now"):
        train(toy_config(seed=1), assemble_toy, clean)
    with pytest.raises(WorkdirError, match="not the workdir of a run"):
        train(toy_config(), assemble_toy, clean.parent)


def test_a_run_continues_with_another_way_to_compute_the_same(clean, tmp_path):
    """From step 6 on with another remat and optimization_level, the latter unknown to the version that began."""
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(toy_config(), functools.partial(assemble_toy, terminate_at=7), workdir)
    settings = json.loads((workdir / "config.json").read_text())
    del settings["optimization_level"]
    (workdir / "config.json").write_text(json.dumps(settings))
    assert train(toy_config(**{"model.remat": "full", "optimization_level": "O0"}), assemble_toy, workdir)
    for one, other in zip(numbers(workdir), numbers(clean), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)
    with pytest.raises(WorkdirError, match=r"config\.model\.prediction_type"):
        train(toy_config(**{"model.prediction_type": "sample"}), assemble_toy, workdir)


def test_offload_is_refused_where_there_is_no_other_memory(tmp_path):
    with pytest.raises(ConfigError, match=r"--config\.model\.remat=blocks"):
        train(toy_config(**{"model.remat": "offload"}), assemble_toy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_on_save_is_said_plainly(tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to mount a small disk")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises((CheckpointError, WriteError), match=r"No space left.*free some room and run the same comm"):
            train(toy_config(), assemble_toy, small / "run")
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_losses_do_not_depend_on_the_mesh(clean, tmp_path):
    """8 devices (data 4 x fsdp 2) against 1: within 1e-5 relative."""
    sharded = in_process(tmp_path / "run", "--mesh.data=4", "--mesh.fsdp=2", devices=8)
    assert sharded.returncode == 0, sharded.stderr
    for one, eight in zip(numbers(clean), numbers(tmp_path / "run"), strict=True):
        assert one.keys() == eight.keys()
        np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-5)


def test_accumulation_gives_the_same_run(clean, tmp_path):
    assert main(str(tmp_path / "run"), "--accumulation=2") == 0
    np.testing.assert_allclose(
        np.load(tmp_path / "run/export/w.npy"), np.load(clean / "export/w.npy"), rtol=2e-5, atol=3e-6
    )


def test_batches_that_the_devices_do_not_divide_are_refused(tmp_path):
    wrong = in_process(tmp_path / "run", "--batch_size=12", devices=8)
    assert "config.batch_size=12 is not divisible by 8 device(s)" in wrong.stderr and "16" in wrong.stderr


def test_an_open_log_window_that_is_being_saved_is_not_changed_by_later_steps():
    """Checkpoints are written in the background: what was handed over must stay as it was."""
    meter = Meter()
    meter.add({"loss": 1.0})
    saved = meter.get_state()
    meter.add({"loss": 2.0})
    assert saved == {"totals": {"loss": 1.0}, "count": 1, "last": {}}


def test_a_hook_is_given_the_samples_of_evaluations_with_and_without_writers(tmp_path):
    seen = []
    samples = ImageSamples(np.zeros((1, 2, 2, 3), np.float32), ["a"], [{}], np.zeros(1, np.float32), held_out=True)

    def assemble(config, mesh):
        run = assemble_toy(config, mesh)

        def evaluate(components):
            return Evaluation({"eval/good": 0.0}, None, samples)

        return dataclasses.replace(run, method=dataclasses.replace(run.method, evaluate={"good": evaluate}))

    for writers in (("jsonl",), ()):
        config = toy_config(steps=4, **{"eval.every": 2})
        config.writers = writers
        loop.train(config, assemble, tmp_path / str(len(writers)), image_samples_hook=lambda *given: seen.append(given))
    assert [(step, list(given)) for _, step, given in seen] == [
        (step, one) for one in (["jsonl"], []) for step in (0, 2, 4)
    ]
    assert all(given is samples for given, _, _ in seen)


def test_the_first_weights_are_let_go(tmp_path, monkeypatch):
    """Once the state has its copy of them: a second one would fill the devices."""
    first, left = [], []

    def assemble(config, mesh):
        run = assemble_toy(config, mesh)
        trainable = run.trainable
        first.extend(map(weakref.ref, jax.tree.leaves(trainable)))
        return dataclasses.replace(run, reference_of=lambda cast: cast(trainable))

    def look(self):
        gc.collect()
        left.extend(reference() for reference in first)

    monkeypatch.setattr(loop._Loop, "run", look)
    loop.train(toy_config(), assemble, tmp_path / "run")
    assert left and not any(array is not None for array in left)


def test_an_export_has_a_card_and_the_run_leaves_the_files_it_was_assembled_with(tmp_path):
    def assemble(config, mesh):
        return dataclasses.replace(assemble_toy(config, mesh), files={"notes.txt": "mine"}, license="mit")

    train(toy_config(steps=2), assemble, tmp_path / "run")
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    card = (tmp_path / "run/export/README.md").read_text()
    good = {row["step"]: row["eval/good"] for row in numbers(tmp_path / "run") if "eval/good" in row}
    assert 'license: "mit"' in card and f"| {good[0]:.4g} | {good[2]:.4g} |" in card


def test_best_only_keeps_and_exports_the_best(tmp_path):
    """Scores 0, 2, 1, 3, 1 at steps 0, 4, 8, 12, 16: steps 4 and 12 are saved in turn, and 12 is exported."""
    weights, scores = {}, dict(zip((0, 4, 8, 12, 16), (0.0, 2.0, 1.0, 3.0, 1.0)))

    def assemble(config, mesh):
        run = assemble_toy(config, mesh)

        def evaluate(components):
            step = 4 * len(weights)
            weights[step] = np.asarray(components["net"]["w"])
            return Evaluation({"eval/good": scores[step]})

        run.method = dataclasses.replace(run.method, evaluate={"good": evaluate})
        return run

    changes = {"steps": 16, "eval.every": 4, "checkpoint.best_only": True}
    train(toy_config(**changes), assemble, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["12"]
    np.testing.assert_array_equal(np.load(tmp_path / "run/export/w.npy"), weights[12])
    assert not np.array_equal(weights[12], weights[16])


def test_best_only_over_a_restart_keeps_the_best_of_before(tmp_path):
    """Stopped after the best evaluation (step 4), the run goes on with worse ones and exports that of step 4."""
    evaluated = iter((0.0, 9.0, 1.0, 2.0))

    def assemble(terminate_at):
        def build(config, mesh):
            run = assemble_toy(config, mesh, terminate_at=terminate_at)

            def evaluate(components):
                return Evaluation({"eval/good": next(evaluated)})

            run.method = dataclasses.replace(run.method, evaluate={"good": evaluate})
            return run

        return build

    config = toy_config(**{"steps": 12, "eval.every": 4, "checkpoint.best_only": True})
    with pytest.raises(Interrupted, match="at step 6"):
        train(config, assemble(7), tmp_path / "run")
    saved = sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == [4, 6]  # the best, and where the run stopped
    train(config, assemble(None), tmp_path / "run")
    assert [int(path.name) for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()].count(4) == 1
    best = tmp_path / "best"
    train(toy_config(**{"steps": 4, "eval.every": 4}), assemble_toy, best)
    # the schedule of 12 steps is another one than that of 4, so the weights are compared with the checkpoint's own
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "run/checkpoints/4/state")
    np.testing.assert_array_equal(np.load(tmp_path / "run/export/w.npy"), np.asarray(state["ema"]["net"]["w"]))


def test_a_killed_runs_writers_go_on_without_gaps_or_doubles(clean, tmp_path):
    """TensorBoard's scalars of a run that was killed and restarted: at the end every step once, as in metrics.jsonl."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    workdir = tmp_path / "run"
    killed = in_process(workdir, "--fault.die_at=13", "--tensorboard=1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(str(workdir), "--tensorboard=1") == 0
    events = accumulator.EventAccumulator(str(workdir))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("refl/loss")}
    rows = {row["step"]: row["refl/loss"] for row in read_rows(workdir / "metrics.jsonl") if "refl/loss" in row}
    assert found.keys() == rows.keys()
    for step, value in rows.items():
        np.testing.assert_allclose(found[step], value, rtol=1e-6)


@pytest.mark.parametrize("steps", [3, 50])
def test_a_profile_that_reaches_the_end_of_the_run_is_written(tmp_path, monkeypatch, steps):
    """Steps 3 to 5 of 5: the trace is stopped once, by the end of the run if need be, also for 50 steps asked for."""
    import jax

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    train(toy_config(**{"steps": 5, "profile.steps": steps}), assemble_toy, tmp_path / "run")
    assert calls == [("start", str(tmp_path / "run/profile")), ("stop",)]


def test_a_profile_of_a_run_that_is_stopped_is_written(tmp_path, monkeypatch):
    import jax

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.raises(Interrupted):
        assemble = functools.partial(assemble_toy, terminate_at=7)
        train(toy_config(**{"profile.steps": 50}), assemble, tmp_path / "run")
    assert calls == ["start", "stop"]


def test_evaluations_compile_once(tmp_path):
    """Of 5 evaluations only the first compiles the cast of the weights."""
    import jax

    compiled = []
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        import logging

        class Counted(logging.Handler):
            def emit(self, record):
                if "Finished XLA compilation of jit(cast_weights)" in record.getMessage():
                    compiled.append(record.getMessage())

        handler = Counted()
        logging.getLogger("jax").addHandler(handler)
        patch.setattr(logging.getLogger("jax"), "propagate", False)
        try:
            train(toy_config(**{"steps": 8, "eval.every": 2}), assemble_toy, tmp_path / "run")
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert len(compiled) == 1, compiled
