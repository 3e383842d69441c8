"""Which pipelines open, what is read of them and when."""

import json
import shutil

import child
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd1
import tiny_sdxl

from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import join
from imagereward_jax.pipelines import UnknownModel, load_pipeline, open_pipeline
from imagereward_jax.pipelines.families import PUBLISHED, from_architecture
from imagereward_jax.weights import files, mapping
from imagereward_jax.weights.files import WeightsError, read_tensors
from imagereward_jax.weights.generation import FILE, Generation


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_sd1.make_one_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    made[0].save(path, made[1])
    return path


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionXLInpaintPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionControlNetPipeline"],
)
@pytest.mark.parametrize("download", [True, False])
def test_other_pipelines_are_refused(folder, tmp_path, name, download):
    """Whatever weights are beside it: an SDXL for inpainting is no text-to-image model."""
    shutil.copytree(folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    with pytest.raises(ValueError, match=f"model_index.json: _class_name='{name}' is not implemented"):
        open_pipeline(tmp_path / "other", download=download)


def test_a_network_of_another_class_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    parts = json.loads(index.read_text()) | {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]}
    index.write_text(json.dumps(parts))
    with pytest.raises(
        ValueError, match="text_encoder is CLIPTextModelWithProjection; StableDiffusionPipeline has CLIP"
    ):
        open_pipeline(tmp_path / "other")


def test_opening_reads_no_weights(folder, tmp_path):
    """A folder without any weight file opens; only reading them fails."""
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = open_pipeline(tmp_path / "bare")
    assert pipeline.tokenize(["a red circle"])["text_encoder"].shape == (1, 16)
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        pipeline.load_params()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_shapes(name):
    """The networks' published sizes and CLIP's length of prompts, with nothing downloaded."""
    pipeline = open_pipeline(name, download=False, dtype="bfloat16")
    denoiser = {"3.5-medium": 2_469_663_936, "3.5-large": 8_146_280_768, "xl": 2_567_463_684, "v1": 859_520_964}
    counts = {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in pipeline.abstract_params().items()
    }
    assert counts[pipeline.denoiser] == next(count for part, count in denoiser.items() if part in name)
    shapes = {part: ids.shape for part, ids in pipeline.tokenize(["a", "b"]).items()}
    expected = dict.fromkeys(pipeline.text_encoders, (2, 77))
    assert shapes == expected | ({"text_encoder_3": (2, 256)} if "text_encoder_3" in expected else {})
    with pytest.raises(ValueError, match="has no files"):
        pipeline.load_params()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownModel, match=r"did you mean 'stabilityai/sdxl-turbo'.*CompVis"):
        open_pipeline("stabilityai/sdxl-turb", download=False)


def test_an_architecture_has_the_family_of_its_components(made, tmp_path):
    folder = made[0].tokenizer_folders["tokenizer"]
    vocab_size = made[0].configs["text_encoder"].vocab_size
    parts = tiny_sd1.configs(vocab_size) | {"scheduler": tiny_sd1.SCHEDULER}
    assert from_architecture(parts, folder).family == "sd1"
    first, second = tiny_sdxl.text_encoders(vocab_size)
    xl = {"unet": tiny_sdxl.UNET, "vae": tiny_sdxl.VAE, "text_encoder": first, "text_encoder_2": second}
    assert from_architecture(xl | {"scheduler": tiny_sdxl.SCHEDULER}, folder).family == "sdxl"
    with pytest.raises(ValueError, match="an architecture of unet, vae is of no family"):
        from_architecture({key: parts[key] for key in ("unet", "vae", "scheduler")}, folder)


def test_loading_in_a_dtype_is_casting(folder, made):
    """Each leaf in the dtype of its target, to the bit; components that are left out are not read."""
    pipeline = open_pipeline(folder)
    target = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)
        for name, tree in pipeline.abstract_params().items()
        if name != "vae"
    }
    loaded = pipeline.load_params(target)
    assert loaded.keys() == {"unet", "text_encoder"}
    for name, tree in loaded.items():
        expected = jax.tree.map(lambda array: np.asarray(array).astype(jnp.bfloat16), made[1][name])
        jax.tree.map(np.testing.assert_array_equal, tree, expected)
        assert {array.dtype for array in jax.tree.leaves(tree)} == {np.dtype(jnp.bfloat16)}


def test_with_lora_leaves_the_base_as_it_was(made):
    """Two pipelines from one: the base's graph and weights stay, the adapter starts as nothing and then matters."""
    pipeline, params = made
    before = jax.tree.structure(pipeline.abstract_params())
    adapted = pipeline.with_lora("unet", pipeline.lora_targets, rank=2, alpha=2.0)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(nnx_lora(adapted))}
    assert names == {"lora_A", "lora_B"} and adapted.adapted["unet"] and pipeline.adapted == {}
    assert jax.tree.structure(pipeline.abstract_params()) == before and not jax.tree.leaves(nnx_lora(pipeline))
    latents = jax.random.normal(jax.random.key(0), (1, *pipeline.latent_shape(16, 16)))
    cond = {"prompt_embeds": jax.random.normal(jax.random.key(1), (1, 16, 24))}
    own = lora.init(adapted.networks["unet"], jax.random.key(2))
    predict, with_adapter = jax.jit(pipeline.predict), jax.jit(adapted.predict)
    base = predict(params, latents, jnp.array([500]), cond)
    joined = join(params, {"unet": own})
    np.testing.assert_array_equal(with_adapter(joined, latents, jnp.array([500]), cond), base)
    moved = join(params, {"unet": jax.tree.map(lambda leaf: leaf + 0.3, own)})
    assert np.abs(with_adapter(moved, latents, jnp.array([500]), cond) - base).max() > 1e-2
    np.testing.assert_array_equal(jax.jit(pipeline.predict)(params, latents, jnp.array([500]), cond), base)


def nnx_lora(pipeline):
    """The low-rank parameters of the UNet, as shapes."""
    return mapping.params_of(pipeline.networks["unet"], lora.LoRAParam)


def test_saving_a_part_copies_the_others_bit_for_bit(folder, made, tmp_path):
    """The UNet from memory; the rest, stored in bfloat16, as the files have it."""
    half = tmp_path / "half"
    as_half = {
        name: jax.tree.map(lambda array: np.asarray(array).astype(jnp.bfloat16), t) for name, t in made[1].items()
    }
    made[0].save(half, as_half)
    pipeline = open_pipeline(half)
    changed = jax.tree.map(lambda array: jnp.asarray(array) * 2, made[1]["unet"])
    pipeline.save(tmp_path / "out", {"unet": changed})
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (tmp_path / "out" / f"{part}.safetensors").read_bytes() == (half / f"{part}.safetensors").read_bytes()
    reopened = open_pipeline(tmp_path / "out")
    target = {"unet": reopened.abstract_params()["unet"]}
    jax.tree.map(np.testing.assert_array_equal, reopened.load_params(target)["unet"], changed)
    with pytest.raises(ValueError, match="has no files"):
        made[0].save(tmp_path / "nothing", {"unet": changed})


def test_generation_settings_go_with_the_model(folder, tmp_path):
    """The family's by default, the file's if there is one, through save; diffusers opens the folder all the same."""
    diffusers = pytest.importorskip("diffusers")
    pipeline, params = load_pipeline(folder)
    assert pipeline.generation == Generation("ddim", 50, 7.5)
    own = Generation("dpmpp_2m", 12, 2.5)
    pipeline.save(tmp_path / "own", params, generation=own)
    assert json.loads((tmp_path / "own" / FILE).read_text()) == {
        "sampler": "dpmpp_2m", "num_inference_steps": 12, "guidance_scale": 2.5,
    }  # fmt: skip
    again = open_pipeline(tmp_path / "own")
    assert again.generation == own
    again.save(tmp_path / "again", params)
    assert open_pipeline(tmp_path / "again").generation == own
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    path = tmp_path / "again" / FILE
    for change, message in (({"steps": 3}, "expected sampler"), ({"num_inference_steps": 0}, "num_inference_steps=0")):
        path.write_text(json.dumps({"sampler": "ddim", "num_inference_steps": 5, "guidance_scale": 1} | change))
        with pytest.raises(WeightsError, match=message):
            open_pipeline(tmp_path / "again")


def test_sdxl_and_turbo_state_their_own(tmp_path):
    assert tiny_sdxl.make(tmp_path / "a")[0].generation == Generation("ddim", 50, 5.0)
    turbo = tiny_sdxl.make(tmp_path / "b", tiny_sdxl.TURBO)[0]
    assert turbo.generation == Generation("euler_ancestral", 1, 0.0)


LOAD_SHARDED = """
import json, sys
from collections import Counter
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding
from imagereward_jax.models import sharding
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.weights import files, mapping

sharding.SMALLEST_SHARDED = 1
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
read = [0]
whole = files.StoredTensor.__getitem__

def counted(self, index):
    part = whole(self, index)
    read[0] += part.nbytes
    return part

files.StoredTensor.__getitem__ = counted
pipeline = open_pipeline(sys.argv[1])

def place(leaf):
    spec = NamedSharding(mesh, sharding.weight_spec(leaf.shape, 4))
    return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=spec)

target = {"unet": jax.tree.map(place, pipeline.abstract_params()["unet"])}
loaded = pipeline.load_params(target)["unet"]
bytes_read, held, split = read[0], 0, 0
reference = pipeline.load_params({"unet": pipeline.abstract_params()["unet"]})["unet"]
for array, struct, full in zip(*map(jax.tree.leaves, (loaded, target["unet"], reference))):
    assert array.sharding == struct.sharding and array.dtype == jnp.bfloat16
    for shard in array.addressable_shards:
        assert np.array_equal(shard.data, full[shard.index].astype(jnp.bfloat16))
    held += array.size * 4  # float32 in the file; every number once for all eight devices
    split += not array.sharding.is_fully_replicated
print(json.dumps([bytes_read, held, split]))
"""


def test_each_device_reads_its_own_part(folder):
    """Eight devices together read every number of the file once, no more: sharded weights by their parts, those that
    several devices hold once for them all."""
    bytes_read, held, split = child.run(LOAD_SHARDED, folder, devices=8)
    assert split > 50 and bytes_read == held


def test_a_stored_tensor_is_read_by_its_parts(tmp_path):
    """Slices along any axis, reshaped or not, are those of the array; nothing is written through them."""
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    files.write_safetensors(tmp_path / "a.safetensors", {"x": array, "y": array.astype(jnp.bfloat16)})
    stored = files.open_tensors(tmp_path / "a.safetensors")
    for name, expected in read_tensors(tmp_path / "a.safetensors").items():
        for index in (slice(1, 2), (slice(0, 2), slice(1, 3)), (slice(None), slice(None), slice(2, 4)), ...):
            part = stored[name][index]
            np.testing.assert_array_equal(part, expected[index])
            assert part.base is None and part.dtype == expected.dtype
        np.testing.assert_array_equal(stored[name].reshape((6, 4))[2:5], expected.reshape(6, 4)[2:5])
        with pytest.raises(ValueError, match="has no shape"):
            stored[name].reshape((5, 5))
