"""Two processes of four virtual devices, started by launch/local.sh, against one process of eight."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import child
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from imagereward_jax.distributed import DistributedError, join
from imagereward_jax.training.metric_writers import read_rows

ROOT = Path(__file__).parents[2]
TOY = [sys.executable, str(Path(__file__).parent / "toy.py")]
# steps small enough that the rounding of sums in another order does not grow
OPTIONS = ["--mesh.fsdp=4", "--log_every=1", "--steps=8", "--checkpoint.every=2", "--optimizer.learning_rate=0.00001"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(workdir, *options, processes=1, devices=8):
    """The toy with `devices` in all."""
    port = free_port()
    env = {**child.environment(devices), "PYTHONPATH": str(ROOT), "PORT": str(port)}
    command = [*TOY, str(workdir), *OPTIONS, *options]
    if processes > 1:
        command = [str(ROOT / "launch/local.sh"), str(processes), str(devices // processes), *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def assert_same_losses(workdir, other, rtol):
    ours, theirs = read_rows(workdir / "metrics.jsonl"), read_rows(other / "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(9))
    for row, wanted in zip(ours[1:], theirs[1:]):
        for name in ("refl/loss", "denoising/loss", "refl/grad_norm"):
            np.testing.assert_allclose(row[name], wanted[name], rtol=rtol, err_msg=f"{name} at step {row['step']}")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of one process, killed in its last steps, and then finished, for comparison, in a copy."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    assert run(workdir, "--fault.die_at=8").returncode != 0
    copies = {}
    for devices in (1, 2, 4, 8):
        copies[devices] = workdir.with_name(f"on{devices}")
        subprocess.run(["cp", "-r", workdir, copies[devices]], check=True)
    assert run(copies[8]).returncode == 0
    return copies


def test_two_processes_give_the_losses_of_one_and_survive_a_kill(eight, tmp_path):
    """Losses within 1e-6. Process 1 is killed in the last steps: process 0 is ended, the reason is said,
    and the same command goes on from there."""
    killed = run(tmp_path / "two", "--fault.die_at=8", "--fault.die_on=1", processes=2)
    assert killed.returncode == 137, killed.stderr
    said = "process 1 ended with status 137: the others cannot go on without it and are stopped; the same command"
    assert said in killed.stderr
    done = run(tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "[0] continuing from step" in done.stderr
    assert_same_losses(tmp_path / "two", eight[8], rtol=1e-6)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_whose_peer_is_gone_says_so_and_ends(tmp_path, killed):
    """One device a process, and no launcher to stop it: the collective that fails ends it, long before jax's 100 s."""
    env = {**child.environment(), "PYTHONPATH": str(ROOT)}
    # after step 5, where the next thing is a collective; after step 4 it may be Orbax's own wait for the other process
    options = ["--steps=8", "--fault.die_at=6", f"--fault.die_on={killed}", f"--coordinator=127.0.0.1:{free_port()}"]
    command = [*TOY, str(tmp_path / "run"), *options, "--num-processes=2"]
    processes = [
        subprocess.Popen([*command, f"--process-id={i}"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for i in range(2)
    ]
    try:
        processes[killed].wait(timeout=300)
        begin = time.monotonic()
        said = processes[1 - killed].communicate(timeout=90)[0].decode()
        assert time.monotonic() - begin < 60
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - killed].returncode == 1, said
    assert f"error: process {1 - killed} of 2 lost another process of this run (" in said
    assert "start them all again with the same command: the run continues from its latest checkpoint" in said


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_checkpoint_of_eight_devices_goes_on_with_fewer(eight, devices):
    done = run(eight[devices], f"--mesh.fsdp={min(devices, 4)}", devices=devices)
    assert done.returncode == 0 and "continuing from step" in done.stderr, done.stderr
    assert_same_losses(eight[devices], eight[8], rtol=1e-6)


def test_incomplete_descriptions_are_refused():
    with pytest.raises(DistributedError, match="--process-id missing"):
        join("localhost:1", 2, None)
    with pytest.raises(DistributedError, match="--process-id 2: expected a number from 0 to 1"):
        join("localhost:1", 2, 2)
