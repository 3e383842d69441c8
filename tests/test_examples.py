"""The example runs as a script, and cell by cell as a notebook."""

import os
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
