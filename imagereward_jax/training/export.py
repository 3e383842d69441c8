"""The end of a run: its export with a model card, and what says how it ended (done.json, report.html)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from imagereward_jax.methods.base import Params
from imagereward_jax.models.param_tree import join
from imagereward_jax.storage.files import write_text
from imagereward_jax.storage.folders import new_folder, refuse_existing
from imagereward_jax.training.checkpoints import CheckpointError, Checkpoints, exports_best
from imagereward_jax.training.html_report import write_report
from imagereward_jax.training.interruptions import closing
from imagereward_jax.training.mesh import host_copy, make_mesh
from imagereward_jax.training.metric_writers import METRICS, read_rows
from imagereward_jax.training.model_card import CARD, PICTURE, before_and_after, model_card
from imagereward_jax.training.program import AssembledRun, TrainingProgram
from imagereward_jax.training.resume import read_state
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


def write_export(
    workdir: Path,
    config: Any,
    run: AssembledRun,
    weights: Params,
    step: int,
    *,
    out: Path | None = None,
    overwrite: bool = True,
) -> None:
    """Writes WORKDIR/export with its model card, in process 0; every process has to call it.

    Args:
        weights: every component on the mesh, as `Export.measure` reads them. step: that they are of.
        out: another folder. overwrite: replace an export that is there.
    """
    export = run.export
    measured = None if export.measure is None else export.measure(weights)
    weights = host_copy(weights, export.components)
    if jax.process_index():
        return
    with new_folder(out or workdir / "export", overwrite=overwrite, marker=export.marker) as folder:
        export.write(weights, measured, folder)
        rows = read_rows(workdir / METRICS)
        if (picture := before_and_after(workdir / "samples", step)) is not None:
            picture.save(folder / PICTURE, format="JPEG", quality=88)
        write_text(folder / CARD, model_card(config, rows, step, export, run.license, pictured=picture is not None))


def export_checkpoint(
    config: Any,
    assemble: Callable[[Any, Mesh], AssembledRun],
    workdir: Path,
    out: Path,
    *,
    step: int | None = None,
    overwrite: bool = False,
) -> int:
    """Writes what a checkpoint of a run holds, as the run's end would; the run itself may go on meanwhile.

    Args:
        config: the run's, which names what it was made of. assemble: see `assembly.run.assemble`.
        step: of the checkpoint; None for the latest.

    Returns:
        The step.

    Raises:
        CheckpointError: there is none, or not of that step, or it is damaged.
        FileExistsError: `out` is there, and not an export that may be replaced.
        ValueError: the method of the run exports nothing.
    """
    manager = Checkpoints(workdir / "checkpoints", keep=1, best=(), read_only=True)
    with closing(manager):
        steps = manager.steps()
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise CheckpointError(f"{manager.folder}: no checkpoint of step {step}; there are: {there}")
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
        run = assemble(config, mesh)
        if run.export is None:
            raise ValueError(f"config.method.name={config.method.name!r} exports nothing")
        refuse_existing(out, overwrite=overwrite, marker=run.export.marker)
        program = TrainingProgram(config, run, mesh)
        state, _ = read_state(manager, program, step)
        weights = join(run.frozen, state.averaged)
        write_export(workdir, config, run, weights, step, out=out, overwrite=overwrite)
    return step


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
