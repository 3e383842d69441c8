"""A user's rewards, those of examples/, in runs: by name, mixed with a network, and handed over from Python."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.assembly.evaluators import SampleEvaluator
from imagereward_jax.assembly.given import Given
from imagereward_jax.assembly.judges import BatchScorer
from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.recipes import recipe_beside, validate
from imagereward_jax.rewards.mixed import MixedReward, Term, Terms
from imagereward_jax.train import main
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.program import TrainingProgram

EXAMPLES, CONFIGS = (Path(__file__).parents[2] / name for name in ("examples", "configs"))
RECIPE = f"""
from imagereward_jax.recipes import recipe_beside

def get_config():
    config = recipe_beside({str(CONFIGS / "x")!r}, "METHOD_tiny")
    config.steps, config.batch_size, config.log_every, config.writers = 1, 4, 1, ("jsonl",)
    config.model.path, config.reward.path = "model", "my_rewards:contrast"
    config.data.prompts = config.eval.prompts = "prompts.json"
    config.method.update({{"num_steps": 3, "height": 8, "width": 8}})
    config.eval.update({{"num_prompts": 4, "images_per_prompt": 2, "batch_size": 4, "num_steps": 2, "every": 1}})
    config.eval.guidance_scale, config.eval.guidance_scales = 1.0, ()
    METHOD_SETTINGS
    return config
"""
SETTINGS = {
    "refl": 'config.method.update({"stop_min": 1, "stop_max": 2, "pretrain": "off", "guidance_max": None})',
    "draft": 'config.method.update({"guidance_max": None, "loss": "linear", "target": 0.0})',
    "ddpo": 'config.method.update({"rounds": 1, "timestep_fraction": 1.0})',
}
BROKEN = """
def untraceable(images):
    return [float(image.mean()) for image in images]

def never(images, prompts):
    return [float("nan")] * len(images)

def empty(images):
    return images.mean((1, 2, 3)) * float("nan")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_reward_folder):
    """A folder as a user has it: a model, a network reward, rewards of their own, prompts with metadata, recipes."""
    folder = tmp_path_factory.mktemp("project")
    tiny_sd1.save_one_level(folder)
    (folder / "reward").symlink_to(tiny_reward_folder)
    (folder / "my_rewards.py").write_text((EXAMPLES / "my_rewards.py").read_text() + BROKEN)
    rows = [
        {"text": f"a {colour} circle", "contrast": i / 8} for i, colour in enumerate(("red", "green", "blue", "red"))
    ]
    (folder / "prompts.json").write_text(json.dumps(rows))
    (folder / "configs").mkdir()
    for method, settings in SETTINGS.items():
        recipe = RECIPE.replace("METHOD_tiny", f"{method}_tiny").replace("METHOD_SETTINGS", settings)
        (folder / f"configs/{method}_tiny.py").write_text(recipe)
    return folder


def train(method, workdir, *options):
    return main(["train", f"--config=configs/{method}_tiny.py", f"--workdir={workdir}", *options])


def last_row(workdir):
    return read_rows(Path(workdir) / "metrics.jsonl")[-1]


def test_a_gradient_flows_through_networks_and_jax_functions(here):
    """ReFL by a network, a jax function and one with tokens: the loss is that of their weighted sum, and it trains."""
    (here / "mixed.py").write_text(
        (here / "configs/refl_tiny.py")
        .read_text()
        .replace("import recipe_beside", "import recipe_beside, reward_term")
        .replace(
            "    return config",
            """    config.reward.path, config.reward.terms = "", {
        "network": reward_term("reward", weight=0.5),
        "warm": reward_term("jax:my_rewards:warm_if_red", weight=3.0),
        "target": reward_term("jax:my_rewards:target"),
    }
    return config""",
        )
    )
    assert main(["train", "--config=mixed.py", f"--workdir={here / 'mixed'}"]) == 0
    row = last_row("mixed")
    for name in ("refl/reward", "eval/reward"):
        total = row[name if name in row else f"{name}_mean"]
        parts = [row[f"{name}_{part}"] for part in ("network", "warm", "target")]
        np.testing.assert_allclose(total, 0.5 * parts[0] + 3 * parts[1] + parts[2], rtol=1e-4, atol=1e-5)
    assert row["refl/grad_norm"] > 0 and row["skipped"] == 0 and "eval/reward_no_verdict" not in row
    assert (here / "mixed/export/model_index.json").is_file()


def test_a_jax_function_alone_is_a_reward_without_weights(here):
    """DRaFT-1 by a reward that has no parameters at all: the loss is its mean, negated, and it trains.

    Without a network, evaluation compares images by their pixels."""
    assert train("draft", "alone", "--config.reward.path=jax:my_rewards:warmth") == 0
    row = last_row("alone")
    assert row["reward_gradient/loss"] == pytest.approx(-row["reward_gradient/reward"], abs=1e-7)
    assert row["reward_gradient/grad_norm"] > 0 and row["skipped"] == 0
    assert row["eval/diversity_pixels"] > 0 and "eval/drift_pixels" in row and "eval/drift" not in row


def test_ddpo_hands_metadata_to_functions_and_logs_named_scores(here):
    """A Python function with metadata, one with named scores and a jax function, in training and evaluation."""
    text = (
        (here / "configs/ddpo_tiny.py").read_text().replace("import recipe_beside", "import recipe_beside, reward_term")
    )
    terms = """    config.reward.path, config.reward.terms = "", {
        "contrast": reward_term("my_rewards:contrast"),
        "named": reward_term("my_rewards:named", weight=2.0),
        "warm": reward_term("jax:my_rewards:warm_if_red"),
    }
    return config"""
    (here / "both.py").write_text(text.replace("    return config", terms))
    assert main(["train", "--config=both.py", f"--workdir={here / 'both'}"]) == 0
    row = last_row("both")
    for name in ("ddpo/reward", "eval/reward"):
        total = row[name if name in row else f"{name}_mean"]
        contrast, named, warm = (row[f"{name}_{part}"] for part in ("contrast", "named", "warm"))
        np.testing.assert_allclose(total, contrast + 2 * named + warm, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(named, row[f"{name}_named.light"] + row[f"{name}_named.short"], rtol=1e-4)
        assert row[f"{name}_no_verdict"] == 0 and contrast < 0
    assert row["eval/reward_named.short"] == pytest.approx(-np.mean([12, 14, 13, 12]) / 100)


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("refl", "jax:my_rewards:untraceable", r"untraceable': the reward failed: \w+: .*\(my_rewards.py, line \d+\)"),
        ("refl", "jax:my_rewards:empty", "jax:my_rewards:empty': none of 8 scores is a finite number"),
        ("ddpo", "my_rewards:never", "my_rewards:never': none of 8 scores is a finite number"),
    ],
)
def test_a_reward_that_gives_no_scores_ends_the_run_in_one_line(here, capsys, method, path, said):
    workdir = here / path.replace(":", "_")
    assert train(method, workdir, f"--config.reward.path={path}") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and re.search(said, line), line
    assert not (workdir / "export").exists()


def test_a_function_without_a_gradient_is_refused_with_what_to_write(here, capsys):
    assert train("refl", here / "no", "--config.reward.path=my_rewards:warmth") == 2
    assert "takes (images); expected (images, prompts)" in capsys.readouterr().err
    assert train("refl", here / "no", "--config.reward.path=my_rewards:named") == 2
    said = capsys.readouterr().err
    assert "config.reward.path='my_rewards:named' has no gradient" in said and "'jax:my_rewards:named'" in said
    assert not (here / "no").exists()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("refl", {}),
        ("draft", {"truncation": "per_step"}),
        ("draft", {"truncation": "spaced", "stop_min": 2, "gradient_steps": 2}),
        ("draft", {"noisings": 1}),
        ("ddpo", {}),
    ],
    ids=["refl", "alignprop", "drtune", "draft_lv", "ddpo"],
)
def test_every_method_is_planned_with_a_jax_function(here, method, settings):
    """The step is traced over shapes; methods that follow the gradient have the function's tokens in their batch."""
    config = recipe_beside(here / "configs/x", f"{method}_tiny")
    config.reward.path = "jax:my_rewards:target"
    config.method.update(settings)
    validate(config)
    mesh = make_mesh(1, 1, jax.devices()[:1])
    run = assemble(config, mesh, abstract=True)
    program = TrainingProgram(config, run, mesh)
    (batch,) = program.abstract_batches().values()
    assert method == "ddpo" or batch["reward"].shape == (4, 3)
    assert program.trace(run, "cpu").jaxpr.out_avals


def test_rewards_are_handed_over_from_python(here):
    """The two scripts as they stand, with a small recipe in the place of the built-in model's; each is short."""
    for name, metric in (("tune_by_gradient", "refl/reward"), ("tune_by_scores", "ddpo/reward")):
        script = EXAMPLES / f"{name}.py"
        code = [line for line in script.read_text().splitlines()[1:] if line]
        assert len(code) < 15
        runpy.run_path(str(script))
        workdir = {"refl/reward": "runs/warmth", "ddpo/reward": "runs/contrast"}[metric]
        assert np.isfinite(last_row(workdir)[metric]) and Path(workdir, "export").is_dir()


def test_what_is_handed_over_is_a_reward_a_function_or_a_mixture(here):
    config, mesh = recipe_beside(here / "configs/x", "ddpo_tiny"), make_mesh(1, 1, jax.devices()[:1])

    def short(images, prompts):
        return [-len(prompt) for prompt in prompts]

    for given in ({"a": short, "b": Term(short, weight=2.0)}, MixedReward({"a": Term(short), "b": Term(short, 2.0)})):
        source = assemble(config, mesh, abstract=True, given=Given(reward=given)).method.phases[0].source
        scores = {name: np.array([1.0, 2.0]) for name in "ab"}
        np.testing.assert_array_equal(source.terms.total(scores), [3, 6])
    config = recipe_beside(here / "configs/x", "refl_tiny")
    with pytest.raises(
        ConfigError, match=r"test_own_rewards:.*short' has no gradient.*pass imagereward_jax.jax_reward"
    ):
        assemble(config, mesh, abstract=True, given=Given(reward=short))
    with pytest.raises(ValueError, match="a mixture needs at least one reward"):
        assemble(config, mesh, abstract=True, given=Given(reward={}))


def test_evaluation_leaves_out_images_without_a_verdict():
    """Of two images per prompt one of the first prompt's and both of the second's have none; the third's have."""

    def some(images, prompts, metadata):
        return [row["score"] if row["score"] >= 0 else np.nan for row in metadata]

    evaluator = object.__new__(SampleEvaluator)
    evaluator.settings, evaluator.check = SimpleNamespace(images_per_prompt=2), False
    evaluator.rewards = BatchScorer(Terms({"some": Term(some)}), make_mesh(1, 1, jax.devices()[:1]), 2)
    evaluator.prompts = ["a", "a", "b", "b", "c", "c"]
    evaluator.metadata = [{"score": score} for score in (4.0, -1, -1, -1, 1.0, 3.0)]
    images = np.zeros((6, 4, 4, 3), np.float32)
    scores, more, _ = evaluator._scores({}, images, images.astype(np.uint8))
    metrics = {**evaluator._means(scores)[0], **more}
    per_prompt = np.array([4.0, 2.0])
    assert metrics == {
        "eval/reward_mean": per_prompt.mean(),
        "eval/reward_std": per_prompt.std(),
        "eval/reward_some": pytest.approx(8 / 3),
        "eval/reward_no_verdict": 3.0,
    }
