"""What a model card says, and what it keeps to itself."""

import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ml_collections")

from imagereward_jax.methods.base import Export
from imagereward_jax.pipelines.families import license_of
from imagereward_jax.recipes import default_config, reward_term
from imagereward_jax.training.model_card import before_and_after, model_card
from imagereward_jax.weights import adapters
from imagereward_jax.weights.diffusers import INDEX

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
ADAPTER = Export(None, adapters.FILE, ("unet",))
MODEL = Export(None, INDEX, ("unet",))
ROWS = [
    {"step": 0, "eval/reward_mean": 0.25, "eval/checker_rate": 0.5},
    {"step": 5, "refl/loss": 1.0},
    {"step": 10, "eval/reward_mean": 1.5, "eval/checker_rate": 0.25},
    {"step": 20, "eval/reward_mean": None},
]


def lora_run():
    config = default_config("refl")
    config.model.path, config.lora.rank, config.steps, config.batch_size = SD15, 8, 20, 32
    config.data.prompts = config.data.pairs = "/home/someone/secret project/prompts.json"
    config.eval.prompts, config.eval.sampler, config.eval.num_steps = "~/held_out.txt", "ddim", 20
    config.eval.guidance_scale, config.optimizer.learning_rate = 3.0, 2e-4
    return config


def head_of(card):
    return {
        name: json.loads(value)
        for name, value in (line.split(": ", 1) for line in re.match(r"---\n(.*?)\n---", card, re.S)[1].splitlines())
    }


def test_an_adapter_names_base_license_reward_figures_and_settings():
    card = model_card(lora_run(), ROWS, 10, ADAPTER, license_of(SD15))
    assert head_of(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": SD15,
        "license": "creativeml-openrail-m",
        "tags": ["imagereward-jax", "refl", "lora"],
    }
    for line in (
        "| trained | low-rank parameters (rank 8) of unet |",
        "| reward | ImageReward-v1.0 |",
        "| steps | 10 of batch 32, seed 0 |",
        "|  | step 0 | step 10 |",
        "| eval/reward\\_mean | 0.25 | 1.5 |",
        "| eval/checker\\_rate | 0.5 | 0.25 |",
        f"pipe = DiffusionPipeline.from_pretrained('{SD15}')",
        "config.optimizer.learning_rate = 0.0002",
    ):
        assert line in card.splitlines(), line
    assert "ReFL, reward feedback learning (ImageReward, arXiv 2304.05977, algorithm 1)." in card
    assert (
        "someone" not in card and "secret" not in card and "(held\\_out.txt)" not in card and "(held_out.txt)" in card
    )


def test_what_is_not_known_is_not_said():
    """A model in a folder of this machine, a license that nobody tells, no evaluation at the exported step."""
    config = lora_run()
    config.model.path, config.reward.path = "/models/mine", ""
    config.reward.terms = {"a": reward_term("PickScore", weight=2.0), "b": reward_term("/rewards/own", weight=-1.0)}
    card = model_card(config, ROWS, 15, MODEL, None)
    assert head_of(card).keys() == {"library_name", "pipeline_tag", "tags"} and head_of(card)["tags"][-1] == "refl"
    assert "| license of the base | not known: see its page |" in card and "# mine tuned by refl" in card
    assert "| reward | 2 x PickScore + -1 x own |" in card and "## Figures" not in card


def test_a_tested_scorer_says_so_and_is_no_diffusers_model():
    config = default_config("ranking")
    config.reward.blip = "/models/model_large.pth"
    rows = [{"step": 4, "test/accuracy": 0.625}]
    card = model_card(config, rows, 4, Export(None, "config.json", ("reward",)), None)
    assert head_of(card)["library_name"] == "imagereward-jax" and "pipeline_tag" not in head_of(card)
    assert "# model\\_large.pth tuned" in card or "# model_large.pth tuned" in card
    assert "| test/accuracy |  | 0.625 |" in card and "with diffusers" not in card.lower()


def test_text_of_others_makes_no_columns_or_tags():
    config = lora_run()
    config.reward.path = "a|b<script>\n# c"
    card = model_card(config, ROWS, 10, ADAPTER, None)
    assert "| reward | a\\|b\\<script\\> # c |" in card and "\n# c" not in card


def test_licenses_come_from_the_name_or_the_folder(tmp_path):
    assert license_of("tiny-shapes") == "apache-2.0" and license_of(f"{SD15}@main") == license_of(SD15)
    assert license_of("someone/unknown") is None and license_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: openrail++\n---\n# license: mit\n")
    assert license_of(tmp_path) == "openrail++"
    (tmp_path / "README.md").write_text("# license\n\nlicense: mit\n")
    assert license_of(tmp_path) is None


def test_what_was_before_stands_beside_what_came_of_it(tmp_path):
    """The two sheets in their order, made small; none where one of them is absent or broken."""
    Image.new("RGB", (1280, 900), "red").save(tmp_path / "step_0000000.png")
    assert before_and_after(tmp_path, 40) is None
    Image.new("RGB", (1280, 900), "blue").save(tmp_path / "step_0000040.png")
    both = np.asarray(before_and_after(tmp_path, 40))
    assert both.shape[0] < 500 and 1280 <= both.shape[1] < 1300
    assert both[-1, 0].tolist() == [255, 0, 0] and both[-1, -1].tolist() == [0, 0, 255]
    assert before_and_after(tmp_path, 0) is None
    (tmp_path / "step_0000040.png").write_bytes(b"broken")
    assert before_and_after(tmp_path, 40) is None
