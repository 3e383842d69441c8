"""A run in a damaged workdir: what is damaged is named, the rest is kept, and the run ends in the same bits."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from test_loop import TIMES
from toy import assemble_toy, toy_config, train

from imagereward_jax.training import loop
from imagereward_jax.training.checkpoints import CheckpointError
from imagereward_jax.training.checksums import checksums
from imagereward_jax.training.interruptions import Interrupted
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.workdir import WorkdirError


def numbers(workdir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(workdir / "metrics.jsonl")]


def terminated(config, mesh):
    return assemble_toy(config, mesh, terminate_at=14)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that a signal ended between two evaluations, with its two latest checkpoints and the best."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        train(toy_config(), terminated, workdir)
    return workdir


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder):
    os.truncate(largest(folder / "state"), 1000)


def flip(folder):
    path = largest(folder / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def lose_loop(folder):
    shutil.rmtree(folder / "loop")


def other_position(folder):
    """Valid JSON with another number: only the checksum tells."""
    path = folder / "loop" / "metadata"
    values = json.loads(path.read_text())
    values["streams"]["rows"]["examples"] += 8
    path.write_text(json.dumps(values))


def break_metrics(folder):
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / "metrics" / "metrics").write_text('{"eval/good": ')


@pytest.mark.parametrize("damage", [empty, cut, flip, lose_loop, other_position, break_metrics])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(damage, clean, stopped, tmp_path, capfd):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    before, newest = steps(workdir)[-2:]
    damage(workdir / "checkpoints" / str(newest))
    assert train(toy_config(), assemble_toy, workdir)
    said = capfd.readouterr().err
    assert f"checkpoint of step {newest} is damaged, now in {workdir}/damaged_checkpoints/{newest}" in said
    assert f"continuing from step {before}\n" in said and "Traceback" not in said
    assert numbers(workdir) == numbers(clean)
    np.testing.assert_array_equal(np.load(workdir / "export/w.npy"), np.load(clean / "export/w.npy"))


def test_without_a_whole_checkpoint_the_run_says_so(stopped, tmp_path):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    for step in steps(workdir):
        flip(workdir / "checkpoints" / str(step))
    before = steps(workdir)
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*start in another --workdir"):
        train(toy_config(), assemble_toy, workdir)
    assert steps(workdir) == before


def test_a_checksum_sees_every_bit_and_every_place():
    """Any flipped bit of float32, int32, bfloat16 and bool arrays, and an exchange of two numbers."""
    rng = np.random.default_rng(0)
    base = {"f": rng.normal(size=(5, 3)).astype(np.float32), "i": np.arange(4, dtype=np.int32), "b": np.array([True])}
    sums = checksums(base)
    for name in ("f", "i"):
        for bit in range(0, base[name].nbytes * 8, 7):
            data = bytearray(base[name].tobytes())
            data[bit // 8] ^= 1 << bit % 8
            changed = np.frombuffer(bytes(data), base[name].dtype).reshape(base[name].shape)
            other = checksums({**base, name: changed})
            assert {key for key in sums if sums[key] != other[key]} == {f"['{name}']"}
    swapped = checksums({**base, "i": base["i"][::-1]})
    assert swapped["['i']"] != sums["['i']"]


def test_a_damaged_line_of_the_metrics_costs_that_line_alone(clean, stopped, tmp_path, capfd):
    workdir = shutil.copytree(stopped, tmp_path / "run")
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1] = lines[1][:20] + b"\xff" + lines[1][21:]
    lines[2:2] = [b"5", b"{}"]
    (workdir / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert train(toy_config(), assemble_toy, workdir)
    said = capfd.readouterr().err
    for number in (2, 3, 4):
        assert f"metrics.jsonl, line {number} is damaged" in said
    assert numbers(workdir) == [row for row in numbers(clean) if row["step"] != 3]


def test_a_run_killed_before_its_first_file_begins_anew(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in (".config.json.tmp", ".lock"):
        (workdir / name).write_text("{")
    assert train(toy_config(steps=2), assemble_toy, workdir)
    assert not [path.name for path in workdir.iterdir() if path.name.startswith(".")]


def with_test(config, mesh):
    run = assemble_toy(config, mesh)
    return dataclasses.replace(run, method=dataclasses.replace(run.method, test=lambda _: {"test/sum": 1.0}))


def test_a_run_killed_in_its_export_logs_the_test_row_once(tmp_path):
    """done.json is the last file; leftovers of the export are removed. A longer run keeps the row of its first end."""
    workdir = tmp_path / "run"
    assert train(toy_config(steps=4), with_test, workdir)
    before = numbers(workdir)
    (workdir / "done.json").unlink()
    (workdir / ".export.partial").mkdir()
    assert train(toy_config(steps=4), with_test, workdir)
    assert numbers(workdir) == before and [row["step"] for row in before if "test/sum" in row] == [4]
    assert not (workdir / ".export.partial").exists()
    assert train(toy_config(steps=6), with_test, workdir)
    assert [row["step"] for row in numbers(workdir) if "test/sum" in row] == [4, 6]


def test_files_of_the_user_are_told_before_training_or_left_alone(tmp_path):
    workdir = tmp_path / "run"
    assert train(toy_config(steps=2), assemble_toy, workdir)
    (workdir / "samples/step_final.png").write_bytes(b"mine")
    assert train(toy_config(steps=4), assemble_toy, workdir)
    assert (workdir / "samples/step_final.png").read_bytes() == b"mine"
    shutil.rmtree(workdir / "export")
    (workdir / "export").mkdir()
    (workdir / "export/notes.txt").write_text("mine")
    rows = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(WorkdirError, match=r"export is not overwritten.*move it away"):
        train(toy_config(steps=6), assemble_toy, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == rows
    (workdir / "report.html").unlink()
    (workdir / "report.html").mkdir()
    with pytest.raises(WorkdirError, match=r"report.html: a run has a file there"):
        train(toy_config(steps=6), assemble_toy, workdir)


def test_a_second_run_in_a_workdir_is_told_who_is_there(tmp_path):
    """The second starts while the first makes its evaluation before the first step."""
    workdir, told = tmp_path / "run", []

    def evaluated(config, mesh):
        run = assemble_toy(config, mesh)
        evaluate = run.method.evaluate["good"]

        def and_start_another(components):
            if not told:
                begin = time.monotonic()
                with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is at work there") as refused:
                    loop.train(toy_config(steps=2), assemble_toy, workdir)
                told.append((str(refused.value), time.monotonic() - begin))
            return evaluate(components)

        run.method.evaluate["good"] = and_start_another
        return run

    assert train(toy_config(steps=2), evaluated, workdir)
    assert len(told) == 1 and told[0][1] < 5
    assert not (workdir / ".lock").exists()
