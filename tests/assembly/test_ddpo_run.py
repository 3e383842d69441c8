"""DDPO from the command line: a network and a Python function as one reward, evaluated, exported and planned."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.assembly.run import assemble
from imagereward_jax.recipes import recipe_beside, validate
from imagereward_jax.train import main
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.program import TrainingProgram

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = f"""
from imagereward_jax.recipes import judge, recipe_beside, reward_term

def get_config():
    config = recipe_beside({str(CONFIGS / "x")!r}, "ddpo_tiny")
    config.steps, config.batch_size, config.writers = 1, 4, ("jsonl",)
    config.model.path, config.reward.path = "model", ""
    config.reward.terms = {{"network": reward_term("reward"), "mine": reward_term("my_judges:red", weight=2.0)}}
    config.method.update({{"num_steps": 3, "height": 8, "width": 8, "round_size": 4, "timestep_fraction": 0.7}})
    config.eval.update({{"num_prompts": 4, "images_per_prompt": 2, "batch_size": 4, "num_steps": 3, "every": 1}})
    config.eval.judges = {{"network": judge("reward"), "size": judge("jpeg-compressibility")}}
    return config
"""
REWARDS = """
def red(images, prompts):
    assert images.dtype == "uint8" and all("a " in prompt for prompt in prompts)
    return images[..., 0].mean((1, 2)) / 255

def broken(images, prompts):
    raise LookupError("the judge is asleep")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_reward_folder):
    """A folder with a model, a reward, a module of rewards and a recipe."""
    folder = tmp_path_factory.mktemp("project")
    tiny_sd1.save_one_level(folder)
    (folder / "reward").symlink_to(tiny_reward_folder)
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "my_judges.py").write_text(REWARDS)
    return folder


def test_the_command_trains_with_networks_and_functions(here, capsys, monkeypatch):
    """A step of two rounds and two updates; ratios are 1 within 1e-6 before the first. A judge that is the network of
    the reward scores as it does, one that is a function scores too. Then a function that fails ends
    a run, before anything is sampled for training, in one line with its name."""
    assert main(["train", "--config=recipe.py", f"--workdir={here / 'run'}"]) == 0
    rows = read_rows(here / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and (here / "run/export/model_index.json").is_file()
    step = rows[1]
    assert step["ddpo/ratio_error"] < 1e-6 and step["ddpo/approx_kl"] < 0.1 and step["skipped"] == 0
    assert {"ddpo/reward_std", "ddpo/clipfrac", "ddpo/loss", "ddpo/grad_norm"} < set(step)
    for row, name in ((step, "ddpo/reward"), (step, "eval/reward"), (rows[0], "eval/reward")):
        total = row[name if name in row else f"{name}_mean"]
        np.testing.assert_allclose(total, row[f"{name}_network"] + 2 * row[f"{name}_mine"], rtol=1e-4)
    assert step["eval/judge_network"] == pytest.approx(step["eval/reward_network"], abs=1e-5)
    assert step["eval/judge_size"] < 0 < step["eval/diversity"] and step["eval/drift"] > 0 == rows[0]["eval/drift"]
    capsys.readouterr()
    broken = "--config.reward.terms.mine.path=my_judges:broken"
    assert main(["train", "--config=recipe.py", f"--workdir={here / 'broken'}", broken]) == 1
    said = (
        "error: config.reward.terms.mine.path='my_judges:broken': the reward failed: LookupError: the judge is asleep "
        "(my_judges.py, line 7)"
    )
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_a_plan_knows_the_batches_and_says_what_it_leaves_out(here):
    """The step is traced over shapes: 2 of 3 sampler steps of 4 samples, with what they are conditioned on."""
    config = recipe_beside(here / "recipe.py", "recipe")
    config.reward.terms.mine.path = "jpeg-compressibility"
    config.eval.judges.network.path = "nowhere"  # judges are no part of a step
    validate(config)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    run = assemble(config, mesh, abstract=True)
    assert re.search(
        r"one update, of which a step makes 2; .*2 round\(s\) of 4 per step.*not counted", run.assumptions[0]
    )
    program = TrainingProgram(config, run, mesh)
    batch = program.abstract_batches()["ddpo"]
    assert batch["steps"]["latents"].shape == (4, 2, 8, 8, 4) and batch["steps"]["step"].shape == (4, 2)
    assert batch["cond"]["prompt_embeds"].shape == batch["negative_cond"]["prompt_embeds"].shape == (4, 16, 24)
    assert program.updates == 2 and program.trace(run, "cpu").jaxpr.out_avals


def test_a_schedule_without_noise_is_refused_before_anything_is_written(here, capsys):
    assert main(["train", "--config=recipe.py", f"--workdir={here / 'silent'}", "--config.method.eta=0.0"]) == 2
    assert re.search("ddim with eta=0 on scheduler_config.json .* adds no noise", capsys.readouterr().err)
    assert not (here / "silent").exists()
