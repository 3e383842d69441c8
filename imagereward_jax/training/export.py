"""The end of a run: its export with a model card, and what says how it ended (done.json, report.html)."""

import json
from pathlib import Path
from typing import Any

import jax

from imagereward_jax.methods.base import Params
from imagereward_jax.storage.files import write_text
from imagereward_jax.storage.folders import new_folder
from imagereward_jax.training.checkpoints import exports_best
from imagereward_jax.training.html_report import write_report
from imagereward_jax.training.mesh import host_copy
from imagereward_jax.training.metric_writers import METRICS, read_rows
from imagereward_jax.training.model_card import CARD, model_card
from imagereward_jax.training.program import AssembledRun
from imagereward_jax.training.workdir import DONE


def chosen_by(config: Any, stopped: str) -> str:
    """The metric whose best checkpoint is exported: the judge's after a stop, else that of config.checkpoint; "" for
    the last weights, whatever they score.

    Args:
        stopped: why the run was stopped (`Watch.stopped`), or "".
    """
    if stopped:
        return config.stop.judge
    return config.eval.best if exports_best(config) else ""


def write_export(workdir: Path, config: Any, run: AssembledRun, weights: Params, step: int) -> None:
    """Writes WORKDIR/export with its model card, in process 0; every process has to call it.

    Args:
        weights: every component on the mesh, as `Export.measure` reads them. step: that they are of.
    """
    export = run.export
    measured = None if export.measure is None else export.measure(weights)
    weights = host_copy(weights, export.components)
    if jax.process_index():
        return
    with new_folder(workdir / "export", overwrite=True, marker=export.marker) as folder:
        export.write(weights, measured, folder)
        rows = read_rows(workdir / METRICS)
        write_text(folder / CARD, model_card(config, rows, step, export, run.license))


def write_ending(workdir: Path, config: Any, step: int, exported: int, stopped: str) -> None:
    """Writes report.html and done.json.

    Args:
        step: the run's last. exported: the step that was exported. stopped: see `chosen_by`.
    """
    ending, done = "", {"step": step, "exported": exported}
    if stopped:
        before = " (before the first step)" if exported == 0 else ""
        ending = (
            f"Stopped at step {step}: {stopped}. Exported is step {exported}, the best by {config.stop.judge}{before}."
        )
        done |= {"stopped": stopped, "stop": json.loads(config.stop.to_json())}
    write_report(workdir, ending)
    write_text(workdir / DONE, json.dumps(done))
