"""The recipes of GRPO, NFT, AWM and DPO: the training step of each is traced over the shapes of a small model of its
family, with the adapters, references and copies of the weights that it asks for."""

from pathlib import Path

import jax
import pytest
import tiny_sd1
import tiny_sd3
import tiny_sdxl

for package in ("diffusers", "transformers", "grain", "ml_collections"):
    pytest.importorskip(package)

from imagereward_jax.assembly.run import assemble
from imagereward_jax.recipes import recipe_beside, validate
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.program import TrainingProgram

CONFIGS = Path(__file__).parents[2] / "configs"
# The copies and the reference of each recipe's method, and the rows of a batch of 4.
RECIPES = {
    "grpo_sd35_lora": ((), True, {"latents": (4, 3, 8, 8, 16), "step": (4, 3)}),
    "ddpo_sd35_lora": ((), False, {"latents": (4, 3, 8, 8, 16), "step": (4, 3)}),
    "nft_sd35_lora": (("old",), True, {"clean": (4, 8, 8, 16), "step": (4, 3)}),
    "awm_sd35_lora": (("average",), True, {"clean": (4, 8, 8, 16), "step": (4, 3)}),
    "dpo_sd35_lora": ((), True, {"image": (4, 2, 16, 16, 3)}),
    "grpo_sdxl_lora": ((), False, {"latents": (4, 2, 8, 8, 4), "step": (4, 2)}),
    "dpo_sdxl_lora": ((), True, {"image": (4, 2, 16, 16, 3)}),
    "dpo_sd15": ((), True, {"image": (4, 2, 16, 16, 3)}),
}


QUICK = ("grpo_sd35_lora", "nft_sd35_lora", "dpo_sd35_lora", "grpo_sdxl_lora")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: folder}"""
    root = tmp_path_factory.mktemp("models")
    tiny_sd3.make(root / "tokenizers3").save_pretrained(root / "sd35")
    for name, module in (("sdxl", tiny_sdxl), ("sd15", tiny_sd1)):
        pipeline, params = module.make(root / f"tokenizers_{name}")
        pipeline.save(root / name, params)
    return root


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_step_of_a_recipe_is_traced(name, models):
    copies, reference, expected = RECIPES[name]
    config = recipe_beside(CONFIGS / "x", name)
    config.batch_size, config.accumulation, config.reward.path = 4, 2, ""
    config.model.path = str(models / name.split("_")[1])
    if name.startswith("dpo"):
        config.data.image_size = 16
    else:
        config.reward.path = "jpeg-compressibility"
        config.method.update({"height": 16, "width": 16, "num_steps": 4, "rounds": 1, "round_size": 4})
        config.method.update({"group_size": 4} if "group_size" in config.method else {})
        config.method.update({"noise_levels": 3} if "noise_levels" in config.method else {})
    validate(config)
    run = assemble(config, make_mesh(1, 1, jax.devices()[:1]), abstract=True)
    program = TrainingProgram(config, run, make_mesh(1, 1, jax.devices()[:1]))
    (batch,) = program.abstract_batches().values()
    rows = {**batch, **batch.get("steps", {})}
    assert {key: rows[key].shape for key in expected} == expected
    assert tuple(run.method.copies) == copies and run.method.reference == reference
    metrics = jax.tree.leaves(program.trace(run, "cpu").jaxpr.out_avals)
    assert len(metrics) > 5
