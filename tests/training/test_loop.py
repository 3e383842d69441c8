"""The loop: what a run leaves, and that interruptions of every kind lose nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from toy import build_toy, main, toy_config

from imagereward_jax.training.checkpoints import CheckpointError
from imagereward_jax.training.config import ConfigError
from imagereward_jax.training.loop import Evaluation, Interrupted, RunError, train
from imagereward_jax.training.metric_writers import Meter, read_rows
from imagereward_jax.training.workdir import WorkdirError

TIMES = ("time", "images_per_second")


def in_process(*arguments, devices=1):
    """Runs toy.py in a process of its own."""
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).parent / "toy.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def numbers(workdir):
    """The rows of metrics.jsonl without the clock's."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("clean") / "run"
    assert main(str(workdir)) == 0
    return workdir


def test_a_run_leaves_what_the_design_lists(clean):
    assert {path.name for path in clean.iterdir()} == {
        "config.json", "done.json", "metrics.jsonl", "samples", "checkpoints", "export", "report.html"
    }  # fmt: skip
    rows = read_rows(clean / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert all("time" in row for row in rows)
    assert [row["step"] for row in rows if "eval/good" in row] == [0, 10, 20]
    assert sorted(path.name for path in (clean / "samples").iterdir()) == [
        f"step_{step:07d}.png" for step in (0, 10, 20)
    ]
    page = (clean / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<svg" in page and "http" not in page.partition("<svg")[0]


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
        train(config, lambda config, mesh: build_toy(config, mesh, terminate_at=7), workdir)
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
    train(config, lambda config, mesh: build_toy(config, mesh, nan_from=4, nan_until=5), tmp_path / "run")
    assert numbers(tmp_path / "run")[-1]["skipped"] == 2  # both phases of one step
    assert np.isfinite(np.load(tmp_path / "run/export/w.npy")).all()


def test_too_many_non_finite_updates_stop_the_run_with_good_weights(tmp_path):
    config = toy_config()
    with pytest.raises(RunError, match="4 updates in a row") as stopped:
        train(config, lambda config, mesh: build_toy(config, mesh, nan_from=4, nan_until=99), tmp_path / "run")
    assert "checkpoints/6" in str(stopped.value)
    assert numbers(tmp_path / "run")[-1]["step"] == 3
    assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 20


def test_the_workdir_of_another_run_is_refused(clean):
    with pytest.raises(WorkdirError, match=r"config\.seed: 0 there, 1 now"):
        train(toy_config(seed=1), build_toy, clean)
    with pytest.raises(WorkdirError, match="not the workdir of a run"):
        train(toy_config(), build_toy, clean.parent)


def test_a_run_continues_with_another_way_to_compute_the_same(clean, tmp_path):
    """From step 6 on with another remat and optimization_level, the latter unknown to the version that began."""
    workdir = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(toy_config(), lambda config, mesh: build_toy(config, mesh, terminate_at=7), workdir)
    settings = json.loads((workdir / "config.json").read_text())
    del settings["optimization_level"]
    (workdir / "config.json").write_text(json.dumps(settings))
    assert train(toy_config(**{"model.remat": "full", "optimization_level": "O0"}), build_toy, workdir)
    for one, other in zip(numbers(workdir), numbers(clean), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)
    with pytest.raises(WorkdirError, match=r"config\.model\.prediction_type"):
        train(toy_config(**{"model.prediction_type": "sample"}), build_toy, workdir)


def test_offload_is_refused_where_there_is_no_other_memory(tmp_path):
    with pytest.raises(ConfigError, match=r"--config\.model\.remat=blocks"):
        train(toy_config(**{"model.remat": "offload"}), build_toy, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_on_save_is_said_plainly(tmp_path):
    if os.geteuid():
        pytest.skip("needs root, to mount a small disk")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises((CheckpointError, OSError), match="No space left"):
            train(toy_config(), build_toy, small / "run")
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
    assert saved == {"totals": {"loss": 1.0}, "last": {}, "count": 1}


def test_best_only_keeps_and_exports_the_best(tmp_path):
    """Scores 0, 2, 1, 3, 1 at steps 0, 4, 8, 12, 16: steps 4 and 12 are saved in turn, and 12 is exported."""
    weights, scores = {}, dict(zip((0, 4, 8, 12, 16), (0.0, 2.0, 1.0, 3.0, 1.0)))

    def build(config, mesh):
        experiment = build_toy(config, mesh)

        def evaluate(trainable, frozen):
            step = 4 * len(weights)
            weights[step] = np.asarray(trainable["net"]["w"])
            return Evaluation({"eval/good": scores[step]})

        experiment.evaluate = evaluate
        return experiment

    changes = {"steps": 16, "eval.every": 4, "checkpoint.best_only": True}
    train(toy_config(**changes), build, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["12"]
    np.testing.assert_array_equal(np.load(tmp_path / "run/export/w.npy"), weights[12])
    assert not np.array_equal(weights[12], weights[16])
