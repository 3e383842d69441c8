"""The example runs as a script, and cell by cell as a notebook; so do the notebooks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

import imagereward_jax as RM
from imagereward_jax.training.metric_writers import read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example(shortened):
    return shortened((ROOT / "examples/tune_from_python.py").read_text(encoding="utf-8"), "STEPS = 30")


def check(folder, printed):
    """Two steps, of which the hook was told, and a model that opens."""
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.partition(",")[0] for line in lines] == [
        "step 0: 4 held-out images", "step 1: 16 training images", "step 2: 16 training images",
        "step 2: 4 held-out images",
    ]  # fmt: skip
    assert [row["step"] for row in read_rows(folder / "runs/redness/metrics.jsonl")] == [0, 1, 2]
    RM.load_pipeline(folder / "runs/redness_model")


def test_as_a_script(example, tmp_path):
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path, done.stdout)
    assert "2/2" in done.stderr  # the bar


@pytest.mark.slow  # the same lines, by another program
def test_as_a_notebook(example, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell("# " + cell) for cell in example.split("\n# %%")[1:]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    check(tmp_path, "".join(output.text for output in outputs if output.get("name") == "stdout"))
    assert any("2/2" in output.get("text", "") or output.output_type == "display_data" for output in outputs)


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = """\
config.steps = STEPS
config.batch_size = config.eval.num_prompts = 4
config.eval.images_per_prompt = 1"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    """They are valid, their first code installs the package if it is missing, and a page of the docs names them."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, *others = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 'find_spec("imagereward_jax") is None' in first.source and '"pip"' in first.source
    assert not any(cell.outputs or cell.execution_count for cell in [first, *others])
    assert not any('"pip"' in cell.source for cell in others)
    assert f"`notebooks/{path.name}`" in (ROOT / "docs/howto/notebooks.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """In two steps where they train: no cell fails or installs, and a figure is shown."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"^STEPS = \d+$", "STEPS = 2", cell.source, flags=re.MULTILINE)
        cell.source = re.sub(r"^config\.steps = STEPS$", SMALL, cell.source, flags=re.MULTILINE)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(cell.outputs for cell in notebook.cells[:2] if cell.cell_type == "code")
    assert (tmp_path / "runs").exists() == (path.stem != "score")
