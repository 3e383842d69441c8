"""The export of a checkpoint, beside a run that goes on."""

import shutil

import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("grain")

from toy import assemble_toy, toy_config

from imagereward_jax.training.checkpoints import CheckpointError
from imagereward_jax.training.export import export_checkpoint
from imagereward_jax.training.model_card import CARD, PICTURE
from imagereward_jax.training.workdir import WorkdirError, read_config


def test_a_checkpoint_is_exported_beside_a_run_that_goes_on(clean, tmp_path):
    """The last one to the bytes of the run's own export; nothing in the workdir changes, not a file in the making."""
    copy = tmp_path / "run"
    shutil.copytree(clean, copy)
    (copy / "checkpoints/30.orbax-checkpoint-tmp-1").mkdir()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    config = read_config(copy)
    assert config.to_json() == toy_config().to_json()
    steps = sorted(int(path.name) for path in (copy / "checkpoints").iterdir() if path.name.isdigit())
    assert export_checkpoint(config, assemble_toy, copy, tmp_path / "last") == steps[-1] == config.steps
    files = [path.relative_to(copy / "export") for path in (copy / "export").rglob("*") if path.is_file()]
    assert files and all(
        (tmp_path / "last" / one).read_bytes() == (copy / "export" / one).read_bytes() for one in files
    )
    assert export_checkpoint(config, assemble_toy, copy, tmp_path / "first", step=steps[0]) == steps[0]
    named = [one for one in files if one.name != PICTURE]  # of steps that were evaluated alone
    differ = [one for one in named if (tmp_path / "first" / one).read_bytes() != (copy / "export" / one).read_bytes()]
    assert len(differ) >= 2, "weights and card"
    for folder in (copy / "export", tmp_path / "first"):
        assert ((folder / PICTURE).is_file(), f"]({PICTURE})" in (folder / CARD).read_text()) in (
            (True,) * 2,
            (False,) * 2,
        )
    assert (copy / "export" / PICTURE).is_file(), "step 20 was evaluated"
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    with pytest.raises(CheckpointError, match=rf"no checkpoint of step 7; there are: {steps[0]}, "):
        export_checkpoint(config, assemble_toy, copy, tmp_path / "none", step=7)
    with pytest.raises(FileExistsError):
        export_checkpoint(config, assemble_toy, copy, tmp_path / "last")
    with pytest.raises(FileNotFoundError, match="expected the workdir of a run"):
        read_config(tmp_path)
    (copy / "config.json").write_text('{"method": {"name": "unheard"}}')
    with pytest.raises(WorkdirError, match="not the config of a run of this version"):
        read_config(copy)
