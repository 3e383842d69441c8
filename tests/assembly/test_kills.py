"""Runs of the built-in model that are killed and resumed end in the bits of a run that never stopped."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import child
import jax
import numpy as np
import pytest

pytest.importorskip("grain")
ocp = pytest.importorskip("orbax.checkpoint")

from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.weights.files import read_tensors

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 4
COMMON = [f"steps={STEPS}", "batch_size=4", "checkpoint.every=2", "writers=('jsonl',)", "optimizer.warmup_steps=0"]
COMMON += [f"eval.{field}" for field in ("num_prompts=2", "images_per_prompt=1", "batch_size=2", "num_steps=2")]
COMMON += ["eval.every=4", "data.prompts=prompts.txt"]
# Two updates a step, from two rounds that a function scores, with statistics of three prompts.
DDPO = ["reward.path=jpeg-compressibility"]
DDPO += [f"method.{field}" for field in ("num_steps=3", "timestep_fraction=0.7", "rounds=2", "round_size=4")]
DDPO += ["method.prompt_buffer=8", "method.prompt_min_count=2"]
RUNS = {"ddpo_tiny": [*COMMON, *DDPO], "alignprop_tiny": [*COMMON, "method.num_steps=3"]}
# Place, call of it, signal. A step of DDPO has two calls of all but "save"; of "reward" the first is evaluation's.
MOMENTS = [
    *(("ddpo_tiny", "rollout", call, name) for call, name in ((1, "SIGKILL"), (4, "SIGTERM"), (6, "SIGKILL"))),
    *(("ddpo_tiny", "reward", call, name) for call, name in ((3, "SIGTERM"), (6, "SIGKILL"))),
    *(("ddpo_tiny", "batch", call, name) for call, name in ((4, "SIGKILL"), (6, "SIGTERM"), (8, "SIGKILL"))),
    *(("ddpo_tiny", "save", call, name) for call, name in ((1, "SIGKILL"), (1, "SIGTERM"))),
    ("alignprop_tiny", "batch", 3, "SIGKILL"),
    ("alignprop_tiny", "batch", 4, "SIGTERM"),
    ("alignprop_tiny", "save", 1, "SIGKILL"),
]


def run(folder, recipe, place="never", call=0, name="SIGKILL"):
    """The exit status of a run in `folder`/run."""
    fields = [f"--config.{field}" for field in RUNS[recipe]]
    script = str(Path(__file__).parent / "killed_run.py")
    command = [sys.executable, script, place, str(call), name, f"--config={CONFIGS / recipe}.py", "--workdir=run"]
    (folder / "prompts.txt").write_text("a red circle\na small blue cross in the center\na green square\n")
    done = subprocess.run([*command, *fields], cwd=folder, env=child.environment(), capture_output=True, text=True)
    print(done.stderr[-2000:])
    return done.returncode


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The folder of a recipe's run that never stopped."""

    @functools.cache
    def folder_of(recipe):
        folder = tmp_path_factory.mktemp(recipe)
        assert run(folder, recipe) == 0
        return folder

    return folder_of


def final_state(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / f"run/checkpoints/{STEPS}/state").absolute())


def numbers(folder):
    rows = read_rows(folder / "run/metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("time", "images_per_second")} for row in rows]


@pytest.mark.parametrize(("recipe", "place", "call", "name"), MOMENTS)
def test_killed_and_resumed_ends_in_the_same_bits(clean, tmp_path, recipe, place, call, name):
    """The last checkpoint, the metrics and the export."""
    number, expected = signal.Signals[name], clean(recipe)
    stopped = -number if number == signal.SIGKILL else 128 + number
    assert run(tmp_path, recipe, place, call, name) == stopped
    assert not (tmp_path / "run/done.json").exists()
    assert run(tmp_path, recipe) == 0
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(expected))
    assert numbers(tmp_path) == numbers(expected)
    exported = "run/export/unet/diffusion_pytorch_model.safetensors"
    jax.tree.map(np.testing.assert_array_equal, read_tensors(tmp_path / exported), read_tensors(expected / exported))
