"""What a recipe holds on each device, from shapes alone, at the sizes of the published models."""

import itertools
import json
from pathlib import Path

import jax
import pytest
import tiny_sdxl
from jax.sharding import AbstractMesh
from PIL import Image

pytest.importorskip("ml_collections")


from imagereward_jax.assembly.parts import Parts
from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.data.errors import DataError
from imagereward_jax.planning.counts import flops_by_dtype
from imagereward_jax.planning.report import bytes_per_device
from imagereward_jax.recipes import default_config, recipe_beside
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.program import TrainingProgram

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe_of(name, **changes):
    """(config, run over shapes) of a recipe."""
    config = recipe_beside(CONFIGS / f"{name}.py", name)
    config.update_from_flattened_dict(changes)
    return config, assemble(config, AbstractMesh((1, 1), ("data", "fsdp")), abstract=True)


def batches_of(run):
    return {phase.name: phase.source.spec() for phase in run.method.phases}


def traced(config, run):
    return TrainingProgram(config, run, make_mesh(1, 1, jax.devices()[:1])).trace(run, "cpu")


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def on(config, run, devices):
    """Bytes by kind on each of so many devices."""
    program = TrainingProgram(config, run, AbstractMesh((1, devices), ("data", "fsdp")))
    return bytes_per_device(run, program)


def test_bytes_of_full_sdxl_by_hand():
    """4 bytes a weight, 8 of moments, 2 a frozen weight (4 in the reward's vectors and head); with 8 devices an eighth
    of it, but for vectors too small to split (0.5 %)."""
    config, run = recipe_of("refl_sdxl")
    unet, frozen = 2_567_463_684, 83_653_863 + 123_060_480 + 694_659_840 + 446_665_953
    assert (count(run.trainable), count(run.frozen)) == (unet, frozen)
    one, eight = on(config, run, 1), on(config, run, 8)
    vision, text = 24 * 13 * 1024 + 3 * 1024, 12 * 19 * 768 + 2 * 768
    head = sum((a + 1) * b for a, b in itertools.pairwise((768, 1024, 128, 64, 16, 1)))
    assert one["frozen"] == 2 * frozen + 2 * (vision + text + 2 * 256 + head)
    assert one["parameters"] == 4 * unet and one["ema"] == 0
    assert 8 * unet <= one["moments"] < 8 * unet + 100
    ids, tokens, images = 2 * 77 * 4, 35 * 4, 1024 * 1024 * 3 * 4
    assert one["batch"] == 128 * (2 * ids + 2 * tokens + images + 6 * 4)  # without guidance no negative prompt
    assert eight["batch"] == one["batch"] // 8
    weights = ("parameters", "moments", "frozen")
    total = sum(one[kind] for kind in weights)
    assert total / 8 < sum(eight[kind] for kind in weights) < 1.005 * total / 8


def test_an_adapter_alone_has_moments():
    _, run = recipe_of("refl_sd15_lora")
    assert count(run.trainable) == 797_184
    assert count(run.frozen) == 859_520_964 + 83_653_863 + 123_060_480 + 446_665_953


def test_cached_pairs_need_no_pictures():
    batches = batches_of(recipe_of("refl_sdxl_lora", **{"data.cache": "folder"})[1])
    cached = batches["denoising"]
    assert batches["refl"]["cond"]["prompt_embeds"].shape == (128, 77, 2048) and "ids" not in batches["refl"]
    assert {name: leaf.shape[1:] for name, leaf in cached["cond"].items()} == {
        "prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)
    }  # fmt: skip
    assert cached["latent_mean"].shape == (128, 128, 128, 4) and "image" not in cached


def test_built_in_models_are_as_their_config_says():
    config = default_config("denoising")
    config.model.path = config.reward.path = "tiny-shapes"
    parts = Parts(config, None, abstract=True)
    assert parts.pipeline.configs["unet"].block_out_channels[0] < 320
    assert count(parts.reward.params) < 1e7


def test_a_model_from_scratch_and_an_autoencoder_are_planned():
    """The shapes world's autoencoder: its own weights alone, by the sizes that its recipe gives."""
    config, run = recipe_of("shapes_vae")
    shapes = Parts(config, None, abstract=True).pipeline.abstract_params()
    assert count(run.trainable) == count(shapes["vae"]) and not run.frozen
    assert batches_of(run)["autoencoder"]["image"].shape == (16, 32, 32, 3)


def test_a_plan_has_the_sampler_in_int8_and_the_rest_as_it_was():
    """The whole step of a recipe, its update too: with the loop run never, once and five times."""
    pytest.importorskip("qwix")
    counted = {}
    for kind in ("none", "int8"):
        changes = {"method.rollout_quantization": kind, "method.pretrain": "off", "batch_size": 1}
        changes["method.guidance_max"] = None  # half the work
        config, run = recipe_of("refl_tiny", **changes)
        jaxpr = traced(config, run).jaxpr
        counted[kind] = [flops_by_dtype(jaxpr, trips) for trips in (0, 1, 5)]
    assert set(counted["none"][1]) == {"float32"} and counted["int8"][0] == counted["none"][0]
    assert [by.total() for by in counted["int8"]] == [by.total() for by in counted["none"]]
    _, once, five = counted["int8"]
    assert five["int8"] == 5 * once["int8"] > 0


def test_a_model_of_unknown_sizes_is_refused():
    config = default_config("refl")
    config.model.path = "stabilityai/stable-diffusion-xl-base"
    with pytest.raises(ConfigError, match=r"did you mean 'stabilityai/stable-diffusion-xl-base-1.0'"):
        _ = Parts(config, None, abstract=True).pipeline
    config.reward.path = "PickScore"
    with pytest.raises(ConfigError, match="'PickScore' cannot be planned, only ImageReward"):
        _ = Parts(config, None, abstract=True).reward


def test_a_model_that_cannot_be_loaded_is_not_planned_either(tmp_path):
    """Its class says that it inpaints, though its networks are SDXL's."""
    pipeline, params = tiny_sdxl.make(tmp_path / "tokenizers")
    pipeline.save(tmp_path / "model", params)
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLInpaintPipeline"
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    config = default_config("refl")
    config.model.path = str(tmp_path / "model")
    with pytest.raises(ValueError, match="StableDiffusionXLInpaintPipeline"):
        _ = Parts(config, None, abstract=True).pipeline


def test_bytes_of_a_scorer_by_hand():
    """As its authors train it: of 24 and 12 layers 16 and 8 stay, and the norm's scale and the query of the next."""
    config, run = recipe_of("imagereward")
    width, text = 1024, 768
    block = 12 * width**2 + 13 * width
    attention = lambda width: 2 * (text + 1) * text + 2 * (width + 1) * text + 2 * text  # noqa: E731
    layer = attention(text) + attention(width) + 8 * text**2 + 7 * text
    head = sum((a + 1) * b for a, b in itertools.pairwise((768, 1024, 128, 64, 16, 1)))
    assert count(run.trainable) == 8 * block - width + 2 * width + 4 * layer - text**2 + head
    assert count(run.trainable) + count(run.frozen) == 446_665_953
    one = on(config, run, 1)
    assert one["frozen"] == 4 * count(run.frozen) and one["parameters"] == 4 * count(run.trainable)
    assert one["batch"] == 4 * (9 * (224 * 224 * 3 * 4 + 4) + 2 * 35 * 4)


def test_groups_are_as_large_as_the_data_says(tmp_path):
    """As in the file where it is there; where it is not, that nine are assumed is said."""
    config, unknown = recipe_of("imagereward")
    assert unknown.method.phases[0].source.images == 9 * config.batch_size
    assert "'ImageRewardDB/train.json' is not here, so the largest of its groups is taken" in unknown.assumptions[0]
    names = ["a.png", "b.png", "c.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [{"prompt": "a cat", "generations": names[:k], "ranking": list(range(1, k + 1))} for k in (2, 3)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    for name, largest, changes in (
        ("imagereward", 3, {"data.groups": str(tmp_path / "train.json")}),
        ("imagereward", 2, {"method.mode": "pairs"}),
        ("imagereward_tiny", 5, {}),
    ):
        config, run = recipe_of(name, **changes)
        assert (run.method.phases[0].source.images, run.assumptions) == (largest * config.batch_size, ())
        assert batches_of(run)["ranking"]["images"].shape[1] == largest
    (tmp_path / "c.png").unlink()
    with pytest.raises(DataError, match=r"c\.png"):
        recipe_of("imagereward", **{"data.groups": str(tmp_path / "train.json")})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["refl_sdxl", "refl_sdxl_lora"])
def test_the_full_size_step_lowers(name):
    """Both losses at 1024 px, the sampler, the reward and AdamW in one program; it takes every weight and batch."""
    config, run = recipe_of(name, batch_size=1, accumulation=1)
    program = TrainingProgram(config, run, make_mesh(1, 1, jax.devices()[:1]))
    lowered = program.trace(run, "cpu").lower()
    given = (program.abstract_state, program.fixed(run), program.abstract_batches())
    assert len(jax.tree.leaves(lowered.args_info)) == len(jax.tree.leaves(given)) > 3000
    assert lowered.as_text().count("stablehlo.convolution") > 300
