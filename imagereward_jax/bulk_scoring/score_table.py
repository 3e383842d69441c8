"""Scores the rows of a file on all devices of all processes; an interrupted run resumes."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from imagereward_jax.bulk_scoring.journal import Journal, made_of, wrote
from imagereward_jax.bulk_scoring.rows import check_output, read_rows, state_of, write_rows
from imagereward_jax.bulk_scoring.stream import Scorer, score_chunks
from imagereward_jax.terminal import escape


class Outcome(NamedTuple):
    """Result of a run: number of rows, number of rows scored by earlier runs, and {row: reason} of skipped rows.

    complete: whether an earlier run had written the output of the same rows and settings.
    """

    rows: int
    resumed: int
    errors: dict[int, str]
    complete: bool = False


def score_table(
    source: str | os.PathLike,
    output: str | os.PathLike,
    open_scorer: Callable[[], Scorer],
    *,
    settings: dict[str, Any],
    batch_size: int = 16,
    workers: int | None = None,
    skip_errors: bool = False,
    overwrite: bool = False,
    score_column: str = "score",
    process: tuple[int, int] = (0, 1),
    **columns: str | None,
) -> Outcome:
    """Reads rows, scores those that no earlier run has scored, and writes all rows with their scores.

    Rows are split into fixed chunks of `batch_size`; chunk c belongs to process c mod the number of processes. So a
    resumed run computes the same batches, and its scores are equal bit for bit.

    Args:
        source, columns: see `read_rows`.
        output: .csv, .tsv, .json, .jsonl or .parquet.
        open_scorer: called without arguments if there are rows left to score.
        settings: dict of further settings that must not change on resume (the model, its dtype).
        skip_errors: leaves the score of a broken image empty and gives the reason in a column "error".
        process: (index of this process, number of processes); all share the folder of `output`.

    Returns:
        `Outcome`; its errors are those of all processes only in process 0, which writes the output. An output that a
        run of the same rows, image files and settings wrote stays as it is, unless `overwrite`.

    Raises:
        FileExistsError: the output is there, and is not that; the message says what differs.
        DataError, OSError: input or output cannot be used; found before an image is scored.
        WriteError: the disk is full, say; what is scored stays, and the same command goes on.
        ImageError: an image cannot be used, unless `skip_errors`.
    """
    rows = read_rows(source, skip_errors=skip_errors, **columns)
    added = [score_column, "error"][: 1 + skip_errors]
    index, count = process
    settings = {**settings, "rows": rows.digest(), "batch_size": batch_size}
    chunks = [rows.items[start : start + batch_size] for start in range(0, len(rows.items), batch_size)]
    states = [state_of(chunk) for chunk in chunks]
    made = settings | {"images": hashlib.sha256("".join(states).encode()).hexdigest(), "columns": added}
    if not overwrite and (earlier := made_of(output)) is not None:
        errors = earlier.pop("errors")
        _check_equal(output, earlier, made)
        return Outcome(len(rows.items), len(rows.items), {int(i): text for i, text in errors.items()}, complete=True)
    check_output(output, rows.table, added, overwrite or wrote(output))
    journal = _open_journal(output, settings, index, count)
    try:
        done = {c: entry for c, entry in journal.done().items() if _is_current(entry, c, states, skip_errors)}
        resumed = sum(len(chunks[c]) for c in done)
        mine = [c for c in range(index, len(chunks), count)]
        _score_missing(journal, chunks, states, mine, done, open_scorer, workers, skip_errors, Path(output).name)
        _together("scored", count)
        if index != 0:
            return Outcome(len(rows.items), resumed, {})
        scores, errors = _collect(journal.done(), chunks, batch_size)
        columns = {score_column: scores} | (
            {"error": [errors.get(i) for i in range(len(scores))]} if skip_errors else {}
        )
        made |= {"errors": errors}
        write_rows(output, rows.table, columns, before=lambda partial: journal.note_output(partial, made))
        journal.remove()
        return Outcome(len(scores), resumed, errors)
    finally:
        journal.close()


def _check_equal(output, earlier, now):
    """Refuses an output of other rows, image files or settings."""
    told = {"rows": "other prompts or images", "images": "image files that have changed since"}
    changed = [name for name in now if earlier.get(name) != now[name]]
    if changed:
        differs = (told.get(name) or f"{name} {earlier.get(name)!r}, now {now[name]!r}" for name in changed)
        raise FileExistsError(
            f"--output {output} exists already, of {'; '.join(differs)}: choose another file, or pass --overwrite"
        )


def _open_journal(output, settings, index, count):
    """Opens the journal; process 0 creates the folder before the others open it."""
    journal = Journal(output, settings) if index == 0 else None
    _together("opened", count)
    return Journal(output, settings, index) if journal is None else journal


def _is_current(entry, chunk, states, skip_errors):
    """Whether the scores of a chunk hold: its image files are the same, and none was skipped that should not be."""
    known = chunk in range(len(states)) and entry.get("images", states[chunk]) == states[chunk]
    return known and (skip_errors or not entry["errors"])


def _together(name, count):
    """Waits for all processes."""
    if count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"imagereward_jax score {name}")


def _score_missing(journal, chunks, states, mine, done, open_scorer, workers, skip_errors, title):
    """Scores and records the unfinished chunks of this process."""
    from tqdm import tqdm

    missing = [c for c in mine if c not in done]
    if not missing:
        return
    scorer = open_scorer()
    total = sum(len(chunks[c]) for c in mine)
    initial = total - sum(len(chunks[c]) for c in missing)
    with tqdm(total=total, initial=initial, unit="image", desc=escape(title), file=sys.stderr, smoothing=0.1) as bar:
        results = score_chunks(scorer, (chunks[c] for c in missing), workers=workers, skip_errors=skip_errors)
        for chunk, scored in zip(missing, results):
            journal.add(chunk, scored.scores, scored.errors, states[chunk])
            bar.update(len(scored.scores))


def _collect(done, chunks, batch_size):
    """Returns all scores in the order of the rows, and {row: reason} of the skipped rows."""
    scores, errors = [], {}
    for c, chunk in enumerate(chunks):
        entry = done[c]
        if len(entry["scores"]) != len(chunk):
            raise RuntimeError(f"chunk {c} of the journal has {len(entry['scores'])} scores for {len(chunk)} rows")
        scores += entry["scores"]
        errors |= {c * batch_size + int(index): text for index, text in entry["errors"].items()}
    return scores, errors
