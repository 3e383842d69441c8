"""A LoRA run from the command to its export, on a tiny random model."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sd1

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)

import orbax.checkpoint as ocp

from imagereward_jax.assembly import trainable
from imagereward_jax.assembly.parts import Parts
from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import Method
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.train import main
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.weights import adapters, mapping
from imagereward_jax.weights.files import WeightsError, read_tensors

CONFIG = Path(__file__).parents[2] / "configs" / "refl_tiny_lora.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd1.save_one_level(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def run(model, tiny_reward_folder, tmp_path_factory):
    """The workdir of three steps, with dropout and EMA."""
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    options = [
        "lora.rank=2", "lora.alpha=3.0", "lora.dropout=0.1", "lora.dtype=bfloat16", "steps=3",
        "batch_size=2", "method.num_steps=3", "method.stop_min=0", "method.stop_max=2", "method.height=16",
        "method.width=16", "method.pretrain=off", "eval.num_prompts=1", "eval.images_per_prompt=1", "eval.num_steps=1",
        "eval.batch_size=1", "eval.guidance_scale=1.0", "eval.guidance_scales=()",
        "method.guidance_max=1.0", "optimizer.warmup_steps=0", "writers=('jsonl',)",
        f"model.path={model}", f"reward.path={tiny_reward_folder}",
    ]  # fmt: skip
    command = ["train", f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{option}" for option in options)]
    assert main(command) == 0
    return workdir


def lora_config(**changes):
    config = default_config("refl")
    config.model.path, config.data.prompts, config.eval.prompts = "m", "shapes:train", "shapes:held_out"
    config.method.pretrain = "off"
    config.lora.rank = 2
    config.lora.update(changes)
    return config


def load_weights(model, **changes):
    """(parts, weights) of a run's assembly, without data."""
    config = lora_config(**changes)
    config.model.path = str(model)
    parts = Parts(config, make_mesh(1, 1, jax.devices()[:1]))
    return parts, trainable.load(parts, Method((), trains=(parts.pipeline.denoiser,)))


def test_a_checkpoint_holds_the_adapter_alone(run, model):
    """Weights, EMA and two moments of the low-rank parameters; the base's weights are in none."""
    pipeline, params = load_pipeline(model)
    pipeline = pipeline.with_lora("unet", pipeline.lora_targets, rank=2, alpha=3.0)
    shapes = mapping.params_of(pipeline.networks["unet"], adapters.LoRAParam)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.metadata(run / "checkpoints" / "3" / "state").item_metadata
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    stored = sum(int(np.prod(leaf.shape)) for leaf in leaves) - 2  # the run's random key
    base = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{stored:,} numbers in a checkpoint: 4 x {size:,} low-rank parameters, and {base:,} in the base")
    assert stored == 4 * size


def test_the_export_is_the_adapter_and_the_base_is_unchanged(run, model):
    """The file has bfloat16 tensors of the low-rank parameters alone; after three steps all of them differ from the
    start, and applied at weight 0 they leave every weight of the base as it was, to the bit."""
    names = sorted(path.name for path in (run / "export").iterdir())
    assert names == ["README.md", "before_after.jpg", "generation_config.json", adapters.FILE]
    tensors = read_tensors(run / "export" / adapters.FILE)
    assert all(".lora_" in key and array.dtype.name == "bfloat16" for key, array in tensors.items())
    assert all(np.any(array != 0) for array in tensors.values())
    pipeline, params = load_pipeline(model)
    adapter = adapters.read_adapter(run / "export", pipeline.networks)
    assert {low_rank.scale for low_rank in adapter["unet"].values()} == {1.0}  # alpha 3 over rank 2 is in the weights
    same = adapters.merge(pipeline.networks, params, adapter, 0.0)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_run_continues_from_an_adapter(run, model):
    """Trainable weights are the file's, A to the bit, B but for the scale; the frozen ones are the base's."""
    parts, weights = load_weights(model, alpha=3.0, path=str(run / "export"))
    pipeline, (_, params) = parts.pipeline, load_pipeline(model)
    tensors = read_tensors(run / "export" / adapters.FILE)
    ours = mapping.to_torch(pipeline.networks["unet"], weights.trainable["unet"], kind=adapters.LoRAParam)
    assert {f"unet.{key}" for key in ours} == tensors.keys()
    for key, array in ours.items():
        scale = np.float32(1.5 if "lora_B" in key else 1.0)
        np.testing.assert_allclose(scale * array, tensors[f"unet.{key}"].astype(np.float32), rtol=2e-7)
    jax.tree.map(np.testing.assert_array_equal, {name: weights.frozen[name] for name in params}, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "to_x"}, r"config\.lora .*targets of the unet.*'to_x' matches no layer.*to_out\.0, to_q"),
        ({"rank": 17}, r"config\.lora .*rank=17.*rank 17 is more than a layer of 16 -> 16 features has"),
        ({"path": "absent.safetensors"}, r"absent\.safetensors: no such adapter"),
        ({"rank": 3, "path": "EXPORT"}, r"config\.lora\.path=.*has rank 2, but config\.lora has rank=3"),
        ({"alpha": 3.0, "targets": "to_q", "path": "EXPORT"}, r"config\.lora\.path=.*unexpected:\n.*to_k\.lora_A"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(run, model, changes, message):
    if changes.get("path") == "EXPORT":
        changes = {**changes, "path": str(run / "export")}
    errors = (ConfigError, WeightsError, FileNotFoundError, mapping.CheckpointMismatch)
    with pytest.raises(errors, match=f"(?s){message}"):
        load_weights(model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"config\.lora\.rank=-1: expected a number in \[0, 16384\]"),
        ({"alpha": 0.0}, r"config\.lora\.alpha=0\.0: expected a number above 0"),
        ({"targets": "to_(q"}, r"config\.lora\.targets='to_\(q' is not a valid regular expression"),
        ({"init": "gausian"}, r"config\.lora\.init='gausian': .*did you mean 'gaussian'"),
        ({"dropout": 1.0}, r"config\.lora\.dropout=1\.0: expected a number in \[0, 1\)"),
        ({"dtype": "int8"}, r"config\.lora\.dtype='int8': expected one of float32"),
        ({"rank": 0, "path": "x"}, r"config\.lora\.path='x' has no effect with config\.lora\.rank=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(lora_config(**changes))
