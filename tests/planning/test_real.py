"""A plan's shapes and dtypes are those of the run: its parameters, what is frozen and its batches."""

from pathlib import Path

import jax
import pytest
import tiny_sdxl

for package in ("grain", "ml_collections", "orbax.checkpoint", "datasets", "matplotlib"):
    pytest.importorskip(package)

from imagereward_jax import experiments
from imagereward_jax.planning import program
from imagereward_jax.training.config import recipe_beside
from imagereward_jax.training.mesh import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = {
    "ReFL": ("refl_tiny", {}),
    "ReFL in bfloat16": ("refl_tiny", {"dtype": "bfloat16", "model.vae_dtype": "float32"}),
    "ReFL of an adapter": ("refl_tiny_lora", {"dtype": "bfloat16"}),
    "ReFL of SDXL": ("refl_sdxl_tiny", {"dtype": "bfloat16", "data.image_size": 16}),
    "denoising": (
        "shapes_pretrain",
        {"model.from_scratch": False, "model.path": "tiny-shapes", "model.vae_from": "", "reward.path": "tiny-shapes"},
    ),
    "a scorer": ("imagereward_tiny", {}),
    "a scorer from pairs": ("imagereward_tiny", {"method.mode": "pairs", "dtype": "bfloat16"}),
    "the first layers frozen": ("imagereward_tiny", {"reward.path": "tiny-shapes", "reward.fix_rate": 0.7}),
}


def config_of(name, changes):
    config = recipe_beside(CONFIGS / f"{name}.py", name)
    config.update_from_flattened_dict({"batch_size": 2, "data.workers": 0, **changes})
    return config


def shapes(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(tuple(leaf.shape), str(jax.dtypes.canonicalize_dtype(leaf.dtype))) for leaf in leaves]


@pytest.mark.parametrize("run", RUNS)
def test_a_plan_is_of_what_runs(run, tmp_path):
    config = config_of(*RUNS[run])
    if run == "ReFL of SDXL":
        pipeline, params = tiny_sdxl.make(tmp_path / "tokenizers")
        config.model.path = str(tmp_path / "model")
        pipeline.save(config.model.path, params)
    recipe = program.abstract_recipe(config.copy_and_resolve_references())
    experiment = experiments.build(config, make_mesh(1, 1, jax.devices()[:1]))
    assert shapes(recipe.state.params) == shapes(experiment.trainable)
    assert shapes(recipe.frozen) == shapes(experiment.frozen)
    batches = {name: next(stream) for name, stream in experiment.streams.items()}
    assert shapes(recipe.batches) == shapes(batches)
    assert [phase.name for phase in recipe.phases] == [phase.name for phase in experiment.phases]
    assert config.batch_size * recipe.images_per_sample == experiment.images_per_step
