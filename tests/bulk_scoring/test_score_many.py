"""`score --input --output`: every format, bad images, kills, two processes; beside the scorer's own `score`."""

import csv
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from imagereward_jax import score
from imagereward_jax.bulk_scoring.journal import Journal
from imagereward_jax.bulk_scoring.rows import write_rows
from imagereward_jax.bulk_scoring.scorers import RandomScorer
from imagereward_jax.data.tables import Table, read_table

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PROMPTS = ("a red cat", 'a "blue", dog', "the ocean on a cube 猫")


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray((rng.random((3, 3, 3)) * 255).astype(np.uint8))
        coarse.resize((40 + i % 3, 44), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """rows.csv of ten rows over six images, one prompt for several rows."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images", 6)
    rows = [{"id": f"{i:03}", "image": f"images/{i % 6}.png", "prompt": PROMPTS[i % 3]} for i in range(10)]
    write_csv(folder / "rows.csv", rows)
    return folder


@pytest.fixture(scope="module")
def expected(data, tiny_reward):
    rows = read_csv(data / "rows.csv")
    return tiny_reward.score([row["prompt"] for row in rows], [data / row["image"] for row in rows])


@pytest.fixture
def loaded(tiny_reward, monkeypatch):
    """Lets the command use the tests' own scorer, which is compiled already."""
    monkeypatch.setattr("imagereward_jax.bulk_scoring.scorers.open_scorer", lambda *_, **__: tiny_reward)


def run(*arguments):
    return score.main([str(argument) for argument in (*arguments, "--batch-size", 4)])


def read_any(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return read_csv(path)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_table_comes_out_with_its_scores(suffix, data, expected, loaded, tmp_path):
    """The rows as they were, in their order, and the scores of `score` to 1e-6."""
    output = tmp_path / f"scored{suffix}"
    assert run("--input", data / "rows.csv", "--output", output) == 0
    found = read_any(output)
    given = read_csv(data / "rows.csv")
    assert [{name: row[name] for name in given[0]} for row in found] == given
    assert list(found[0]) == ["id", "image", "prompt", "score"]
    np.testing.assert_allclose([float(row["score"]) for row in found], expected, atol=1e-6)
    assert shown(tmp_path) == [output.name]


def test_parquet_with_encoded_images_keeps_its_types(data, expected, loaded, tmp_path):
    """Columns renamed and chosen by flags; images as bytes; other columns and their types untouched."""
    rows = read_csv(data / "rows.csv")
    table = pyarrow.table(
        {
            "caption_en": [row["prompt"] for row in rows],
            "picture": [(data / row["image"]).read_bytes() for row in rows],
            "seed": pyarrow.array(range(10), pyarrow.int16()),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    flags = ["--prompt-column", "caption_en", "--image-column", "picture", "--score-column", "reward"]
    assert run("--input", tmp_path / "rows.parquet", "--output", tmp_path / "out.parquet", *flags) == 0
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.drop_columns("reward").equals(table)
    np.testing.assert_allclose(found["reward"].to_pylist(), expected, atol=1e-6)
    assert run("--input", tmp_path / "rows.parquet", "--output", tmp_path / "out.csv", *flags) == 2  # bytes in a CSV


def test_folders_with_captions_and_with_one_prompt_for_all(data, tiny_reward, loaded, tmp_path):
    write_images(tmp_path / "images", 5)
    assert run("--input", tmp_path / "images", "--prompt", "a red cat", "--output", tmp_path / "one.csv") == 0
    rows = read_csv(tmp_path / "one.csv")
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(5)]
    paths = [tmp_path / "images" / row["image"] for row in rows]
    np.testing.assert_allclose([float(r["score"]) for r in rows], tiny_reward.score("a red cat", paths), atol=1e-6)
    for i in range(5):
        (tmp_path / f"images/{i}.txt").write_text(PROMPTS[i % 3], encoding="utf-8")
    assert run("--input", tmp_path / "images", "--output", tmp_path / "own.jsonl") == 0
    rows = read_any(tmp_path / "own.jsonl")
    scores = tiny_reward.score([PROMPTS[i % 3] for i in range(5)], paths)
    np.testing.assert_allclose([row["score"] for row in rows], scores, atol=1e-6)


@pytest.fixture
def damaged(data, tmp_path):
    """The rows with a missing, a broken and an empty image among the good ones."""
    rows = read_csv(data / "rows.csv")
    for row in rows:
        row["image"] = str(data / row["image"])
    (tmp_path / "cut.png").write_bytes((data / "images/0.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for i, name in ((1, "gone.png"), (4, "cut.png"), (5, "text.png")):
        rows[i]["image"] = str(tmp_path / name)
    write_csv(tmp_path / "damaged.csv", rows)
    return tmp_path / "damaged.csv"


def test_bad_images_are_skipped_and_reported(damaged, expected, loaded, tmp_path, capsys):
    """The other scores are as ever; the bad rows have none, and say why."""
    assert run("--input", damaged, "--output", tmp_path / "out.csv", "--on-error", "skip") == 0
    rows = read_csv(tmp_path / "out.csv")
    for i, row in enumerate(rows):
        if i in (1, 4, 5):
            assert row["score"] == "" and row["error"].startswith(f"{damaged}, line {i + 2}")
        else:
            assert row["error"] == "" and float(row["score"]) == pytest.approx(expected[i], abs=1e-6)
    assert "gone.png" in rows[1]["error"] and "cut.png" in rows[4]["error"] and "text.png" in rows[5]["error"]
    assert "3 images could not be scored" in capsys.readouterr().err


def test_a_bad_image_stops_the_run_and_it_goes_on_once_mended(damaged, data, expected, loaded, tmp_path, capsys):
    assert run("--input", damaged, "--output", tmp_path / "out.csv") == 2
    assert "gone.png: no such image" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    (tmp_path / "gone.png").write_bytes((data / "images/1.png").read_bytes())
    assert run("--input", damaged, "--output", tmp_path / "out.csv") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"damaged.csv, line 6: .*cut.png", error) and not (tmp_path / "out.csv").exists()
    for i, name in ((4, "cut.png"), (5, "text.png")):
        (tmp_path / name).write_bytes((data / f"images/{i}.png").read_bytes())
    assert run("--input", damaged, "--output", tmp_path / "out.csv") == 0
    found = [float(row["score"]) for row in read_csv(tmp_path / "out.csv")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


BAD = {
    "output that is there": (["--output", "{d}/rows.csv"], "exists already"),
    "output of an unknown kind": (["--output", "{t}/out.xlsx"], "expected one of .csv"),
    "output in no folder": (["--output", "{t}/no/out.csv"], "does not exist"),
    "misspelt column": (["--output", "{t}/o.csv", "--image-column", "imgae"], "did you mean 'image'"),
    "score column taken": (["--output", "{t}/o.csv", "--score-column", "id"], "--score-column"),
    "two prompts": (["--output", "{t}/o.csv", "--prompt", "a", "--prompt-column", "prompt"], "--prompt applies to all"),
    "batch of none": (["--output", "{t}/o.csv", "--batch-size", "0"], "--batch-size 0"),
    "no --output": ([], "--input needs --output"),
    "images too": (["--output", "{t}/o.csv", "a.png"], "one too many"),
    "JSON too": (["--output", "{t}/o.csv", "--json"], "--json is for images"),
    "rank without --distributed": (["--output", "{t}/o.csv", "--process-id", "1"], "need --distributed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, data, tmp_path, capsys):
    arguments, message = BAD[case]
    filled = [argument.format(d=data, t=tmp_path) for argument in arguments]
    try:
        status = score.main(["--model", "random", "--input", str(data / "rows.csv"), *filled])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err) and list(tmp_path.iterdir()) == []


def test_a_journal_of_another_run_is_not_continued(damaged, data, loaded, tmp_path, capsys):
    for name in ("gone.png", "text.png"):
        (tmp_path / name).write_bytes((data / "images/1.png").read_bytes())
    arguments = ["--input", damaged, "--output", tmp_path / "out.csv"]
    assert run(*arguments) == 2  # cut.png
    capsys.readouterr()
    assert run(*arguments, "--model", "other") == 2
    assert re.search("another run .model: 'ImageReward-v1.0' there, 'other' now", capsys.readouterr().err)


class Counting:
    """The random scorer, which notes how many images it read, and refuses one that is named "stop"."""

    def __init__(self):
        self.scorer, self.batch_size, self.read = RandomScorer(batch_size=4), 4, 0

    def prepare(self, image, name=""):
        self.read += 1
        if "stop" in str(image):
            raise KeyboardInterrupt
        return self.scorer.prepare(image, name)

    def score_prepared(self, *arguments):
        return self.scorer.score_prepared(*arguments)


@pytest.fixture
def counting(monkeypatch):
    scorer = Counting()
    monkeypatch.setattr("imagereward_jax.bulk_scoring.scorers.open_scorer", lambda *_, **__: scorer)
    return scorer


def refused(capsys, *arguments):
    """What is said by a command that is refused with 2 and without a traceback."""
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


ROW = {"image": "0.png", "prompt": "a"}
TABLES = {
    "a date in a later row": ([ROW, {**ROW, "when": datetime.date(2026, 1, 2)}], ".jsonl", None),
    "bytes in a later row": ([{**ROW, "b": None}, {**ROW, "b": b"x"}], ".csv", "row 2: the column 'b' holds bytes"),
    "mixed kinds": ([{**ROW, "k": 1}, {**ROW, "k": "x"}], ".parquet", "cannot store the column 'k'"),
    "half a character": ([ROW, {**ROW, "k": "\ud83d"}], ".parquet", "cannot store the column 'k'"),
    "a tab": ([ROW, {**ROW, "k": "a\tb"}], ".tsv", "2: the column 'k' holds a tab or a line break, which .tsv"),
    "a score of its own": ([ROW, {**ROW, "score": 1}], ".csv", "has a column 'score' already"),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_what_the_output_cannot_hold_is_named_before_an_image_is_read(case, kind, counting, tmp_path, capsys):
    rows, suffix, message = TABLES[case]
    write_images(tmp_path, 1)
    source, output = tmp_path / f"rows{kind}", tmp_path / f"out{suffix}"
    try:
        if kind == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(rows[1]) | row for row in rows]), source)
        else:
            source.write_text("\n".join(map(json.dumps, rows)))
    except (TypeError, pyarrow.ArrowException, UnicodeEncodeError):
        pytest.skip(f"{kind} cannot hold this either")
    if message is None or (kind, suffix) == (".parquet", ".parquet"):
        assert run("--input", source, "--output", output) == 0
        assert [row["when"] for row in read_any(output)] == [None, "2026-01-02"]
        return
    assert message in refused(capsys, "--input", source, "--output", output)
    assert counting.read == 0 and sorted(os.listdir(tmp_path)) == sorted(["0.png", source.name])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_that_only_a_later_row_has_is_kept(suffix, counting, tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "keep": "me"}))
    assert run("--input", tmp_path / "rows.jsonl", "--output", tmp_path / f"o{suffix}") == 0
    found = read_any(tmp_path / f"o{suffix}")
    assert [row.get("keep") or None for row in found] == [None, "me"] and all(row["score"] for row in found)


def test_headers_and_columns_of_one_name_are_refused(counting, data, tmp_path, capsys):
    (tmp_path / "doubled.csv").write_text("image,prompt,note,note\n0.png,a,1,2\n")
    said = refused(capsys, "--input", tmp_path / "doubled.csv", "--output", tmp_path / "o.csv")
    assert "line 1: two columns are called 'note'" in said
    flags = ["--score-column", "error", "--on-error", "skip"]
    assert "--score-column error" in refused(
        capsys, "--input", data / "rows.csv", "--output", tmp_path / "o.csv", *flags
    )
    assert counting.read == 0


def test_a_refused_command_does_not_refuse_the_corrected_one(data, tmp_path, capsys):
    arguments = ["--input", data / "rows.csv", "--output", tmp_path / "o.csv"]
    assert "did you mean" in refused(capsys, *arguments, "--model", "tiny-shape")
    assert run(*arguments, "--model", "random") == 0
    assert shown(tmp_path) == ["o.csv"]


def test_skipping_can_be_added_and_taken_back_on_resume(damaged, data, counting, tmp_path, capsys):
    """Only what has no score is read again: the chunk with the broken images; when they are mended, that chunk."""
    (tmp_path / "gone.png").write_bytes((data / "images/1.png").read_bytes())
    arguments = ["--input", damaged, "--output", tmp_path / "o.csv"]
    assert run(*arguments) == 2 and len(finished_chunks(tmp_path / "o.csv")) == 1
    last = tmp_path / "gone.png"
    counting.read = 0
    assert run(*arguments, "--on-error", "skip") == 0 and counting.read == 6
    assert [row["score"] == "" for row in read_csv(tmp_path / "o.csv")] == [i in (4, 5) for i in range(10)]
    assert last.exists()


def test_an_image_that_changed_under_its_name_is_scored_again(data, counting, tmp_path):
    """Interrupted after the first chunk of three; its first image is another one when the command goes on."""
    write_images(tmp_path, 9)
    names = [f"{i}.png" for i in range(9)] + ["stop.png"]
    (tmp_path / "stop.png").write_bytes((tmp_path / "0.png").read_bytes())
    write_csv(tmp_path / "rows.csv", [{"image": name, "prompt": "a"} for name in names])
    arguments = ["--input", tmp_path / "rows.csv", "--output", tmp_path / "o.csv", "--workers", 1]
    assert run(*arguments) == 130
    assert finished_chunks(tmp_path / "o.csv")
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())
    counting.prepare = counting.scorer.prepare
    assert run(*arguments) == 0
    scores = [row["score"] for row in read_csv(tmp_path / "o.csv")]
    assert scores[0] == scores[1] and len(set(scores)) == 9


def shown(folder):
    """Names of files that are not hidden."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_folders_and_files_that_the_command_did_not_write_stay(data, tmp_path, capsys):
    """Beside the output is where scores are kept; the output of a run that was killed at its very end is its own."""
    output, parts = tmp_path / "o.csv", tmp_path / "o.csv.parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("mine")
    arguments = ["--input", data / "rows.csv", "--output", output, "--model", "random"]
    assert "o.csv.parts is where scores are kept" in refused(capsys, *arguments)
    assert (parts / "notes.txt").read_text() == "mine"
    (parts / "notes.txt").unlink()
    parts.rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "remove", Journal.close)
        assert run(*arguments) == 0 and parts.is_dir()
    written = output.read_bytes()
    assert run(*arguments) == 0 and output.read_bytes() == written and not parts.exists()
    output.unlink()
    with pytest.MonkeyPatch.context() as patch:  # while the journal is deleted
        patch.setattr("imagereward_jax.bulk_scoring.journal._record", interrupt)
        assert run(*arguments) == 130
    assert run(*arguments) == 0 and output.read_bytes() == written and shown(tmp_path) == ["o.csv"]
    assert sorted(os.listdir(tmp_path)) == [".o.csv.scored.json", "o.csv"]


def test_a_finished_command_is_told_so_and_another_is_refused(data, tmp_path, capsys):
    """The same rows, images, model and settings: exit status 0, and nothing is scored. Else what differs is named."""
    output, table = tmp_path / "o.csv", tmp_path / "rows.csv"
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    table.write_text("image,prompt\na.png,a cat\ngone.png,a dog\n")
    arguments = ["--input", table, "--output", output, "--model", "random", "--on-error", "skip"]
    assert run(*arguments) == 0
    written = output.read_bytes()
    capsys.readouterr()
    assert run(*arguments) == 0 and output.read_bytes() == written
    told = capsys.readouterr().err
    assert "o.csv is complete: 2 rows, scored by an earlier run" in told and "1 images could not be scored" in told
    assert run(*arguments, "--overwrite") == 0 and "complete" not in capsys.readouterr().err
    differing = {
        "model 'random', now 'tiny-shapes'": ["--model", "tiny-shapes"],
        "columns ['score', 'error'], now ['s', 'error']": ["--score-column", "s"],
        "other prompts or images": ["--prompt", "a bird"],
    }
    for text, flags in differing.items():
        assert f"exists already, of {text}: choose another" in refused(capsys, *arguments, *flags)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    assert "of image files that have changed since" in refused(capsys, *arguments)
    output.write_text("mine")
    assert "exists already; choose" in refused(capsys, *arguments) and output.read_text() == "mine"


def test_a_message_that_a_spreadsheet_would_run_is_text(tmp_path):
    write_rows(tmp_path / "o.csv", Table("t", [{"a": "=1"}], str, None), {"error": ["=cmd()"]})
    assert read_csv(tmp_path / "o.csv") == [{"a": "=1", "error": "'=cmd()"}]


def test_a_tsv_is_read_as_it_was_written(tmp_path):
    """Quotes as they are; a message's line break becomes a space."""
    rows = [{"text": '"a" cat'}, {"text": 'a "dog"'}]
    write_rows(tmp_path / "o.tsv", Table("t", rows, str, None), {"score": [0.5, None], "error": [None, "=a\nb"]})
    added = [{"score": "0.5", "error": ""}, {"score": "", "error": "'=a b"}]
    assert read_table(tmp_path / "o.tsv").rows == [row | more for row, more in zip(rows, added)]


def command(rows, output, model, *more):
    arguments = ["--input", rows, "--output", output, "--model", model, "--batch-size", 4, "--workers", 2, *more]
    return [sys.executable, "-m", "imagereward_jax.score", *map(str, arguments)]


def finished_chunks(output):
    """The numbers of the chunks in the journal; [] where there is none."""
    journals = sorted(output.with_name(f"{output.name}.parts").glob("*.jsonl"))
    lines = [line for path in journals for line in path.read_bytes().split(b"\n")[:-1]]
    return [json.loads(line)["chunk"] for line in lines]


def killed_and_restarted(rows, output, model, chunks, kills=3):
    """Runs the command, kills it -9 whenever another share of the chunks is done, and lets the last run finish."""
    before = []
    for kill in range(kills):
        process = subprocess.Popen(command(rows, output, model), stderr=subprocess.DEVNULL)
        target = (kill + 1) * chunks // (kills + 2)
        while process.poll() is None and len(finished_chunks(output)) < target:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        done = finished_chunks(output)
        assert len(set(done)) == len(done) and done[: len(before)] == before, "a chunk was scored twice, or lost"
        assert len(done) >= target and not output.exists()
        before = done
        with open(output.with_name(f"{output.name}.parts") / "00000.jsonl", "ab") as journal:
            journal.write(b'{"chunk": 1, "sco')  # as a kill in the middle of a write leaves it
    last = subprocess.run(command(rows, output, model), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert re.search(rf"{4 * len(before)} of them by an earlier run", last.stderr)


def check_kills(folder, model, count):
    write_images(folder / "images", 6)
    rows = [{"image": f"images/{i % 6}.png", "prompt": f"{PROMPTS[i % 3]} {i}"} for i in range(count)]
    write_csv(folder / "rows.csv", rows)
    killed_and_restarted(folder / "rows.csv", folder / "killed.csv", model, -(-count // 4))
    assert run("--input", folder / "rows.csv", "--output", folder / "clean.csv") == 0
    assert (folder / "killed.csv").read_bytes() == (folder / "clean.csv").read_bytes()
    found = read_csv(folder / "clean.csv")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert len({row["score"] for row in found}) > count // 2


def test_killed_three_times_the_output_is_that_of_a_clean_run(tiny_reward_folder, loaded, tmp_path):
    """402 rows, kill -9 three times: byte for byte the same file, no chunk scored twice, none lost."""
    check_kills(tmp_path, tiny_reward_folder, 402)


@pytest.mark.slow
def test_killed_three_times_over_2000_rows(tiny_reward_folder, loaded, tmp_path):
    check_kills(tmp_path, tiny_reward_folder, 2000)


def test_two_processes_share_the_rows(data, tiny_reward_folder, expected, tmp_path):
    """Each scores its half of the chunks; process 0 writes what one process would, to the last bit of the scores."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for i in range(2):
        flags = ["--distributed", "--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id", i]
        line = command(data / "rows.csv", tmp_path / "out.csv", tiny_reward_folder, *flags)
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        processes.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "8/8" not in errors[1] and "4/4" in errors[1], "process 1 has one of the three chunks"
    found = [float(row["score"]) for row in read_csv(tmp_path / "out.csv")]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert shown(tmp_path) == ["out.csv"]
