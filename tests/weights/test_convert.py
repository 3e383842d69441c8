"""The commands convert/from_diffusers.py and convert/to_diffusers.py, and the Orbax checkpoints between them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import child
import jax
import numpy as np
import pytest
from convert_scripts import run

from imagereward_jax.weights import diffusers as folders
from imagereward_jax.weights import mapping
from imagereward_jax.weights.components import abstract_network, class_of
from imagereward_jax.weights.files import WeightsError

orbax = pytest.importorskip("imagereward_jax.weights.orbax")
pytest.importorskip("orbax.checkpoint")

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def checkpoint(pipeline_folder, tmp_path_factory):
    """The tiny pipeline as an Orbax checkpoint; tests must not write into it."""
    out = tmp_path_factory.mktemp("orbax") / "checkpoint"
    printed = run("from_diffusers", pipeline_folder, out)
    assert "unet: reading" in printed and printed.endswith(f"wrote {out}\n")
    return out


def structs(folder, name, **options):
    """The abstract parameters of one network of a diffusers folder."""
    config = json.loads((folder / name / "config.json").read_text())
    tree = mapping.params_of(abstract_network(class_of(config, name), config))
    here = {"sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0])} | options
    dtype = here.pop("dtype", np.float32)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, **here), tree)


def test_there_and_back_is_exact(checkpoint, expected, pipeline_folder, tmp_path):
    """Folder -> Orbax -> folder: every tensor, setting and tokenizer file is the same to the bit."""
    run("to_diffusers", checkpoint, tmp_path / "back")
    for name in NETWORKS:
        config, tensors = folders.load_component(tmp_path / "back", name)
        assert config == json.loads((pipeline_folder / name / "config.json").read_text())
        assert tensors.keys() == expected[name].keys()
        for key, array in expected[name].items():
            assert tensors[key].tobytes() == array.tobytes(), f"{name} {key}"
    for path in (pipeline_folder / "tokenizer").iterdir():
        assert (tmp_path / "back" / "tokenizer" / path.name).read_bytes() == path.read_bytes()
    scheduler = folders.load_scheduler_config(pipeline_folder)
    assert folders.load_scheduler_config(tmp_path / "back") == scheduler


def test_diffusers_opens_the_export(checkpoint, torch_networks, tmp_path):
    """StableDiffusionPipeline's UNet then computes the very numbers of the original network."""
    import torch
    from diffusers import StableDiffusionPipeline

    run("to_diffusers", checkpoint, tmp_path / "back")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        outputs = [unet(latents, 500, prompt).sample for unet in (pipeline.unet, torch_networks["unet"])]
    assert outputs[0].isfinite().all() and outputs[0].equal(outputs[1])


def test_bfloat16_is_the_rounded_original(expected, pipeline_folder, tmp_path):
    import ml_dtypes

    run("from_diffusers", pipeline_folder, tmp_path / "half", "--dtype", "bfloat16")
    run("to_diffusers", tmp_path / "half", tmp_path / "back", "--dtype", "bfloat16")
    for name in NETWORKS:
        for key, array in folders.load_component(tmp_path / "back", name)[1].items():
            assert array.dtype == ml_dtypes.bfloat16
            assert array.tobytes() == expected[name][key].astype(ml_dtypes.bfloat16).tobytes(), key


def test_loading_casts_to_the_dtype_asked_for(checkpoint, pipeline_folder):
    half = structs(pipeline_folder, "vae", dtype=jax.numpy.bfloat16)
    loaded = orbax.load_pipeline_checkpoint(checkpoint, {"vae": half})
    assert loaded.keys() == {"vae"}
    assert {array.dtype.name for array in jax.tree.leaves(loaded)} == {"bfloat16"}


LOAD_SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from imagereward_jax.weights import diffusers, mapping, orbax
from imagereward_jax.weights.components import abstract_network, class_of

checkpoint, original = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

def place(x):
    axis = next((i for i, n in enumerate(x.shape) if n % 4 == 0), None)
    spec = P() if axis is None else P(*[None] * axis, "fsdp")
    return jax.ShapeDtypeStruct(x.shape, np.float32, sharding=NamedSharding(mesh, spec))

split = 0
for name, config in orbax.read_manifest(checkpoint)["components"].items():
    network = abstract_network(class_of(config, name), config)
    wanted = jax.tree.map(place, mapping.params_of(network))
    loaded = orbax.load_pipeline_checkpoint(checkpoint, {name: wanted})[name]
    reference = mapping.from_torch(network, diffusers.load_component(original, name)[1])
    assert jax.tree.structure(loaded) == jax.tree.structure(reference)
    for array, struct, full in zip(*map(jax.tree.leaves, (loaded, wanted, reference))):
        assert array.sharding == struct.sharding, (array.sharding, struct.sharding)
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == struct.sharding.shard_shape(struct.shape)
            assert np.array_equal(shard.data, full[shard.index])
        split += not array.sharding.is_fully_replicated
print(json.dumps([jax.device_count(), split]))
"""


def test_eight_devices_each_hold_their_part(checkpoint, pipeline_folder):
    """Every array has the sharding that was asked for, and each shard the right numbers."""
    devices, split = child.run(LOAD_SHARDED, checkpoint, pipeline_folder, devices=8)
    assert devices == 8 and split > 100


def test_large_arrays_are_stored_in_pieces(tmp_path):
    """So that a device reads little beyond its own part: no piece is larger than 4 MiB."""
    import orbax.checkpoint as ocp

    params = {"kernel": np.zeros((1024, 2048), np.float32)}
    orbax.save_pipeline_checkpoint(
        tmp_path / "out", [("unet", {}, params)], pipeline_class="", scheduler_config={}, tokenizers={}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "out" / "unet").item_metadata.tree
    assert np.prod(metadata["kernel"].storage.chunk_shape) * 4 <= 4 * 2**20 < params["kernel"].nbytes


def test_a_checkpoint_of_another_network_is_refused(checkpoint, pipeline_folder):
    """Every parameter that differs is listed before anything is read."""
    wrong = structs(pipeline_folder, "text_encoder")
    with pytest.raises(mapping.CheckpointMismatch) as error:
        orbax.load_pipeline_checkpoint(checkpoint, {"unet": wrong})
    for line in ("conv_in.kernel: unexpected", "text_model.final_layer_norm.scale: missing"):
        assert line in str(error.value)
    wrong = structs(pipeline_folder, "unet")
    wrong["conv_in"]["kernel"] = jax.ShapeDtypeStruct((3, 3, 9, 16), np.float32)
    message = r"conv_in\.kernel: \(3, 3, 4, 16\) in the checkpoint, \(3, 3, 9, 16\) in the network"
    with pytest.raises(mapping.CheckpointMismatch, match=message):
        orbax.load_pipeline_checkpoint(checkpoint, {"unet": wrong})
    with pytest.raises(WeightsError, match="holds no 'text_encoder_2', only text_encoder, unet, vae"):
        orbax.load_pipeline_checkpoint(checkpoint, {"text_encoder_2": wrong})


def test_a_folder_whose_weights_are_of_another_network(pipeline_folder, tmp_path):
    """The command says in one message which tensors do not fit."""
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    shutil.copy(source / "unet" / "diffusion_pytorch_model.safetensors", source / "vae")
    message = run("from_diffusers", source, tmp_path / "out", code=2)
    assert message.startswith(f"error: {source / 'vae'} does not fit the network")
    assert "encoder.conv_in.weight" in message and "time_embedding.linear_1.weight" in message
    assert os.listdir(tmp_path) == ["source"]


def test_a_setting_that_is_not_implemented(pipeline_folder, tmp_path):
    source = shutil.copytree(pipeline_folder, tmp_path / "source")
    config = json.loads((source / "unet" / "config.json").read_text())
    (source / "unet" / "config.json").write_text(json.dumps(config | {"class_embed_type": "timestep"}))
    message = run("from_diffusers", source, tmp_path / "out", code=2)
    assert re.match(r"error: .*class_embed_type='timestep' is not implemented", message)


def test_nothing_is_overwritten_unless_asked(checkpoint, pipeline_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for script, source in (("from_diffusers", pipeline_folder), ("to_diffusers", checkpoint)):
        assert run(script, source, out, code=2) == (
            f"error: {out} exists already; choose another name, or overwrite it (--overwrite)\n"
        )
        assert "is not overwritten" in run(script, source, out, "--overwrite", code=2)
    assert (out / "notes.txt").read_text() == "mine"
    run("to_diffusers", checkpoint, tmp_path / "back")
    (tmp_path / "back" / "old").touch()
    run("to_diffusers", checkpoint, tmp_path / "back", "--overwrite")
    assert not (tmp_path / "back" / "old").exists()


def test_from_the_command_line(pipeline_folder, checkpoint, tmp_path):
    """As their users run them: an error is one line on stderr and exit status 2, and --help explains."""
    scripts = {"from_diffusers.py": pipeline_folder, "to_diffusers.py": checkpoint}
    for script, source in scripts.items():
        start = [sys.executable, str(REPOSITORY / "convert" / script)]
        failed = subprocess.run([*start, source, source], capture_output=True, text=True)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    usage = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True)
    assert "--overwrite" in usage.stdout and "StableDiffusionPipeline" in usage.stdout


def test_sources_that_are_not_what_they_should_be(checkpoint, pipeline_folder, tmp_path):
    assert "no folder" in run("from_diffusers", tmp_path / "absent", tmp_path / "out", code=2)
    assert "no such folder" in run("to_diffusers", tmp_path / "absent", tmp_path / "out", code=2)
    assert "no checkpoint.json" in run("to_diffusers", pipeline_folder, tmp_path / "out", code=2)
    assert "no model_index.json" in run("from_diffusers", checkpoint, tmp_path / "out", code=2)
    assert not os.listdir(tmp_path)


def test_a_damaged_checkpoint_is_named(checkpoint, pipeline_folder, tmp_path):
    """A file that was cut short or lost is named; the other networks can still be read."""
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    wanted = {name: structs(pipeline_folder, name) for name in ("vae", "text_encoder")}
    largest = max(
        (path for path in (damaged / "vae").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=re.escape(str(largest)) + " has .* bytes, expected"):
        orbax.load_pipeline_checkpoint(damaged, wanted)
    largest.unlink()
    with pytest.raises(WeightsError, match=re.escape(str(largest)) + " is not there"):
        orbax.load_pipeline_checkpoint(damaged, wanted)
    del wanted["vae"]
    assert orbax.load_pipeline_checkpoint(damaged, wanted).keys() == {"text_encoder"}
    (damaged / "checkpoint.json").write_text('{"format": "something else"}')
    with pytest.raises(WeightsError, match=r"checkpoint\.json: format is 'something else', expected"):
        orbax.load_pipeline_checkpoint(damaged, wanted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB, too small for the tiny pipeline."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mount.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_nothing_behind(checkpoint, pipeline_folder, small_disk):
    message = run("from_diffusers", pipeline_folder, small_disk / "out", code=1)
    assert re.match(rf"error: {small_disk}/out/unet: needs [\d.]+ MiB, but only 0\.4 MiB of disk are free\n$", message)
    message = run("to_diffusers", checkpoint, small_disk / "out", code=1)
    assert re.match(rf"error: {small_disk}/out/unet/\S+: could not be written .*No space left on device.*\n$", message)
    assert "free some room and run the same command again" in message
    assert not os.listdir(small_disk)


def test_sdxl_there_and_back(tmp_path):
    """Both text encoders and tokenizers, every number of the weights, and the zeroing of empty prompts."""
    import tiny_sdxl

    from imagereward_jax.pipelines import load_pipeline

    pipeline, params = tiny_sdxl.make(tmp_path / "tokenizers", force_zeros_for_empty_prompt=False)
    pipeline.save(tmp_path / "saved", params)
    run("from_diffusers", tmp_path / "saved", tmp_path / "checkpoint")
    run("to_diffusers", tmp_path / "checkpoint", tmp_path / "back")
    back, back_params = load_pipeline(tmp_path / "back")
    assert back.family == "sdxl" and not back.force_zeros_for_empty_prompt
    jax.tree.map(np.testing.assert_array_equal, back_params, params)
    jax.tree.map(np.testing.assert_array_equal, back.tokenize(["a red circle"]), pipeline.tokenize(["a red circle"]))
