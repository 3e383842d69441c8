"""benchmarks/plan_refl.py: what the SDXL recipe holds on each device, and that its step at full size lowers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

pytest.importorskip("ml_collections")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plan_refl():
    spec = importlib.util.spec_from_file_location("plan_refl", REPOSITORY / "benchmarks" / "plan_refl.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_bytes_of_full_sdxl_by_hand(plan_refl):
    """4 bytes a weight and a gradient, 8 of moments, 2 a frozen weight (vectors of the reward 4); with 8 devices an
    eighth of it, but for vectors too small to split (0.5 %)."""
    config = plan_refl.load_config(REPOSITORY / "configs" / "refl_sdxl.py")
    _, figures = plan_refl.plan(config, [1, 8])
    unet, frozen = 2_567_463_684, 83_653_863 + 123_060_480 + 694_659_840 + 446_665_953
    assert figures["parameters"] == {"trainable": unet, "frozen": frozen}
    one, eight = figures["bytes_a_device"][1], figures["bytes_a_device"][8]
    assert one["trainable"] == one["gradient"] == 4 * unet and one["ema"] == 0
    assert 8 * unet <= one["optimizer"] < 8 * unet + 100
    assert 2 * frozen < one["frozen"] < 2.01 * frozen
    assert one["total"] / 8 < eight["total"] < 1.005 * one["total"] / 8


PLACED = """
import sys
sys.path.insert(0, "benchmarks")
import jax, jax.numpy as jnp
import plan_refl
from imagereward_jax.training.mesh import make_mesh, weight_shardings
tree = {"a": jnp.zeros((96, 640)), "b": jnp.zeros((7, 5000)), "c": jnp.zeros(64)}
tree["d"] = jnp.zeros((1280, 3, 3, 320), jnp.bfloat16)
shardings = weight_shardings(make_mesh(1, 8), tree)
placed = jax.device_put(tree, shardings)
found = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(placed))
assert found == plan_refl._bytes(tree, shardings), found
"""


def test_counted_bytes_are_those_on_a_device():
    """Against arrays that are laid over 8 virtual devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", PLACED], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refl_sdxl", "refl_sdxl_lora"])
def test_the_full_size_step_lowers(plan_refl, name):
    """Both losses at 1024 px, the sampler, the reward and AdamW in one program; it takes every weight and batch."""
    config = plan_refl.load_config(REPOSITORY / "configs" / f"{name}.py")
    recipe = plan_refl.abstract_recipe(config)
    lowered = plan_refl.lower(recipe)
    given = (plan_refl.abstract_state(recipe), recipe.frozen, recipe.batches)
    assert len(jax.tree.leaves(lowered.args_info)) == len(jax.tree.leaves(given)) > 3000
    text = lowered.as_text()
    assert "func.func public @main" in text and text.count("stablehlo.convolution") > 300
