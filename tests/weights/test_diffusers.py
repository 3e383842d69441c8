"""Model folders of every age and format give the same tensors, and diffusers opens what is saved."""

import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

import flax_files
import numpy as np
import pytest

from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.storage.folders import StorageError
from imagereward_jax.weights import diffusers as folders
from imagereward_jax.weights.files import WeightsError, read_tensors, write_safetensors

NETWORKS = ("unet", "vae", "text_encoder")
STEM = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].shape == array.shape, name
        assert np.array_equal(tensors[name], array), name


def replace_weights(folder, name, tensors):
    """Leaves nothing but config.json in a component, and writes `tensors` as its one safetensors file."""
    for path in (folder / name).iterdir():
        if path.name != "config.json":
            path.unlink()
    if tensors:
        write_safetensors(folder / name / f"{STEM[name]}.safetensors", tensors)


@pytest.fixture
def copy(pipeline_folder, tmp_path):
    """A copy of the tiny pipeline that a test may change."""
    return shutil.copytree(pipeline_folder, tmp_path / "copy")


@pytest.mark.parametrize("name", NETWORKS)
def test_safetensors(pipeline_folder, expected, name):
    config, tensors = folders.load_component(pipeline_folder, name)
    assert config == json.loads((pipeline_folder / name / "config.json").read_text())
    assert_same(tensors, expected[name])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(torch_networks, expected, tmp_path, name, variant):
    torch_networks[name].save_pretrained(tmp_path / name, max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 1
    assert_same(folders.load_component(tmp_path, name, variant=variant)[1], expected[name])


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_pickles(torch_networks, expected, tmp_path, name, max_shard_size):
    torch_networks[name].save_pretrained(tmp_path / name, safe_serialization=False, max_shard_size=max_shard_size)
    assert not list((tmp_path / name).glob("*.safetensors"))
    assert_same(folders.load_component(tmp_path, name)[1], expected[name])


def test_a_pickled_text_encoder(torch_networks, expected, copy):
    import torch

    replace_weights(copy, "text_encoder", None)
    torch.save(torch_networks["text_encoder"].state_dict(), copy / "text_encoder" / "pytorch_model.bin")
    assert_same(folders.load_component(copy, "text_encoder")[1], expected["text_encoder"])


def test_a_half_precision_variant_is_read_when_asked_for(expected, copy):
    """float16 stays float16, and is found only by its name."""
    half = {key: array.astype(np.float16) for key, array in expected["unet"].items()}
    write_safetensors(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    tensors = folders.load_component(copy, "unet", variant="fp16")[1]
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
    assert_same(tensors, half)
    assert_same(folders.load_component(copy, "unet")[1], expected["unet"])
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r'unet: no diffusion_pytorch_model\.safetensors.*pass variant="fp16"'):
        folders.load_component(copy, "unet")


def test_a_variant_of_some_networks_only(expected, copy):
    """As PyTorch diffusers, the others are read from their plain files."""
    half = {key: array.astype(np.float16) for key, array in expected["unet"].items()}
    write_safetensors(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    assert_same(folders.load_component(copy, "unet", variant="fp16")[1], half)
    assert_same(folders.load_component(copy, "vae", variant="fp16")[1], expected["vae"])


def test_fields_that_change_nothing_are_passed_over(pipeline_folder, copy):
    """`"architectures": null`, and what diffusers' EMAModel writes into the UNet's config.json."""
    average = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 37000, "power": 2 / 3}
    average |= {"update_after_step": 0, "use_ema_warmup": False}
    for name, fields in {"unet": average, "text_encoder": {"architectures": None}}.items():
        path = copy / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    before = open_pipeline(pipeline_folder)
    pipeline = open_pipeline(copy)
    assert pipeline.configs["unet"] == before.configs["unet"]
    assert set(pipeline.load_params()) == {"unet", "vae", "text_encoder"}


def test_a_variant_that_is_not_there(pipeline_folder):
    with pytest.raises(FileNotFoundError, match=r"no model\.bf16\.safetensors.*leave out variant='bf16'"):
        folders.load_component(pipeline_folder, "text_encoder", variant="bf16")


def test_safetensors_come_before_pickles(torch_networks, expected, copy):
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert_same(folders.load_component(copy, "unet")[1], expected["unet"])


@pytest.mark.parametrize("name", NETWORKS)
def test_flax_checkpoints(torch_networks, expected, copy, name):
    config = json.loads((copy / name / "config.json").read_text())
    replace_weights(copy, name, None)
    (copy / name / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    flax_files.write(copy / name, torch_networks[name])
    loaded, tensors = folders.load_component(copy, name)
    assert_same(tensors, expected[name])
    assert loaded == {key: value for key, value in config.items() if key != "dtype"}


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_vae_attention_of_old(expected, copy, as_convolutions):
    old = {}
    for key, array in expected["vae"].items():
        module, kind = key.rsplit(".", 1)
        old_key = f"{flax_files.old_vae_names(module)}.{kind}"
        if as_convolutions and old_key != key and kind == "weight":
            array = array[:, :, None, None]
        old[old_key] = array
    assert len(old.keys() - expected["vae"].keys()) == 16
    replace_weights(copy, "vae", old)
    assert_same(folders.load_component(copy, "vae")[1], expected["vae"])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_with_and_without_prefix(expected, copy, prefix):
    old = {prefix + key.removeprefix("text_model."): array for key, array in expected["text_encoder"].items()}
    old[f"{prefix}embeddings.position_ids"] = np.arange(16)[None]
    replace_weights(copy, "text_encoder", old)
    assert_same(folders.load_component(copy, "text_encoder")[1], expected["text_encoder"])


def test_the_projection_of_a_second_text_encoder_keeps_its_name(tmp_path):
    """transformers saves CLIPTextModelWithProjection with text_projection beside text_model."""
    pytest.importorskip("torch")
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, projection_dim=6)
    network = CLIPTextModelWithProjection(config)
    network.save_pretrained(tmp_path / "text_encoder_2")
    tensors = folders.load_component(tmp_path, "text_encoder_2")[1]
    assert tensors["text_projection.weight"].shape == (6, 8)
    assert all(key.startswith(("text_model.", "text_projection.")) for key in tensors)


def shards(folder, torch_networks):
    """The index file of a sharded UNet in `folder`."""
    torch_networks["unet"].save_pretrained(folder / "unet", max_shard_size="20KB")
    return folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"


def test_an_absent_shard_is_named(torch_networks, tmp_path):
    index = shards(tmp_path, torch_networks)
    shard = sorted(index.parent.glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        folders.load_component(tmp_path, "unet")


def test_a_shard_cut_short_is_named(torch_networks, tmp_path):
    index = shards(tmp_path, torch_networks)
    shard = sorted(index.parent.glob("*-00002-of-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=re.escape(shard.name)):
        folders.load_component(tmp_path, "unet")


def test_an_index_that_does_not_match_its_shards(torch_networks, tmp_path):
    index = shards(tmp_path, torch_networks)
    content = json.loads(index.read_text())
    shard = content["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"conv_in.extra": shard}}))
    with pytest.raises(WeightsError, match=re.escape(shard) + r": lacks.*conv_in\.extra"):
        folders.load_component(tmp_path, "unet")
    index.write_text(json.dumps({"weight_map": {"a": "outside.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"outside\.safetensors"):
        folders.load_component(tmp_path, "unet")
    for broken in ('{"weight_map": ', "{}"):
        index.write_text(broken)
        with pytest.raises(WeightsError, match=re.escape(index.name)):
            folders.load_component(tmp_path, "unet")


def test_what_is_absent_is_named(copy):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        folders.load_component(copy / "nowhere", "unet")
    shutil.rmtree(copy / "vae")
    with pytest.raises(
        FileNotFoundError, match=r"vae: no such folder; .* has scheduler, text_encoder, tokenizer, unet"
    ):
        folders.load_component(copy, "vae")
    replace_weights(copy, "unet", None)
    with pytest.raises(FileNotFoundError, match=r"unet: no diffusion_pytorch_model\.safetensors.*it has config\.json"):
        folders.load_component(copy, "unet")
    (copy / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet/config\.json"):
        folders.load_component(copy, "unet")


def save(folder, pipeline_folder, components, **options):
    folders.save_pipeline(
        folder,
        components,
        pipeline_class="StableDiffusionPipeline",
        scheduler_config=folders.load_scheduler_config(pipeline_folder),
        tokenizers=folders.tokenizers_of(pipeline_folder),
        **options,
    )


def test_diffusers_opens_what_is_saved(pipeline_folder, torch_networks, expected, tmp_path):
    """Every tensor of every network is the same to the bit."""
    from diffusers import StableDiffusionPipeline

    components = {name: folders.load_component(pipeline_folder, name) for name in NETWORKS}
    save(tmp_path / "out", pipeline_folder, components)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.safety_checker is None and pipeline.scheduler.config.steps_offset == 1
    assert pipeline.tokenizer("a red circle").input_ids
    for name, network in torch_networks.items():
        loaded = getattr(pipeline, name).state_dict()
        assert loaded.keys() == network.state_dict().keys()
        assert all(loaded[key].equal(value) for key, value in network.state_dict().items())
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(pipeline_folder, tmp_path):
    out, components = tmp_path / "out", {"unet": folders.load_component(pipeline_folder, "unet")}
    out.mkdir()
    save(out, pipeline_folder, components)
    with pytest.raises(FileExistsError, match="out exists already"):
        save(out, pipeline_folder, components)
    (out / "old").touch()
    save(out, pipeline_folder, components, overwrite=True)
    assert not (out / "old").exists() and (out / "unet").is_dir()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("three years of work")
    with pytest.raises(FileExistsError, match=r"thesis is not overwritten: it has no model_index\.json"):
        save(thesis, pipeline_folder, components, overwrite=True)
    assert (thesis / "thesis.tex").exists() and sorted(os.listdir(tmp_path)) == ["out", "thesis"]


@pytest.mark.parametrize("fault", ["network", "tokenizer", "scheduler"])
def test_a_failed_save_leaves_the_old_folder_and_nothing_else(pipeline_folder, tmp_path, fault):
    out, components = tmp_path / "out", {"unet": folders.load_component(pipeline_folder, "unet")}
    save(out, pipeline_folder, components)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def interrupted():
        yield from components.items()
        raise KeyboardInterrupt

    scheduler = {} if fault == "scheduler" else {"_class_name": "DDIMScheduler"}
    tokenizers = {"tokenizer": tmp_path / "absent"} if fault == "tokenizer" else {}
    kinds = {"network": KeyboardInterrupt, "tokenizer": FileNotFoundError, "scheduler": ValueError}
    with pytest.raises(kinds[fault], match={"tokenizer": "absent", "scheduler": "_class_name"}.get(fault)):
        folders.save_pipeline(
            out,
            interrupted() if fault == "network" else components,
            pipeline_class="StableDiffusionPipeline",
            scheduler_config=scheduler,
            tokenizers=tokenizers,
            overwrite=True,
        )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert os.listdir(tmp_path) == ["out"]


def test_one_component_can_be_saved_alone(tmp_path, pipeline_folder):
    config, tensors = folders.load_component(pipeline_folder, "vae")
    with pytest.raises(ValueError, match=r"vae: config\.json states no class"):
        folders.save_component(tmp_path, "vae", {k: v for k, v in config.items() if k != "_class_name"}, tensors)
    folders.save_component(tmp_path, "vae", config | {"_class_name": "FlaxAutoencoderKL"}, tensors)
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert_same(read_tensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors"), tensors)
    with pytest.raises(FileExistsError, match="vae exists already"):
        folders.save_component(tmp_path, "vae", config, tensors)


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(pipeline_folder, tmp_path, monkeypatch):
    """The very last step fails: the old folder comes back."""
    out, components = tmp_path / "out", {"unet": folders.load_component(pipeline_folder, "unet")}
    save(out, pipeline_folder, components)
    (out / "old").touch()
    rename = Path.rename

    def fail(path, target):
        if path.name.startswith(".out.") and path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StorageError, match=r"out: could not be written .*Input/output error"):
        save(out, pipeline_folder, components, overwrite=True)
    assert (out / "old").exists() and os.listdir(tmp_path) == ["out"]


@pytest.fixture
def remote(copy, tmp_path, monkeypatch):
    """A hub whose one repository is `copy`; downloads copy the files that match."""
    import huggingface_hub

    (copy / "safety_checker").mkdir()
    for name in ("safety_checker/model.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (copy / name).write_bytes(b"large and not needed")
    cache = tmp_path / "cache"

    def download(repo_id, *, allow_patterns, **_):
        for path in copy.rglob("*"):
            name = str(path.relative_to(copy))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return copy


def test_plain_files_are_downloaded_where_the_variant_is_absent(remote, expected):
    half = {key: array.astype(np.float16) for key, array in expected["unet"].items()}
    write_safetensors(remote / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    (remote / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"large and not needed")
    folder = folders.resolve_pipeline("owner/model", variant="fp16")
    assert_same(folders.load_component(folder, "unet", variant="fp16")[1], half)
    assert_same(folders.load_component(folder, "text_encoder", variant="fp16")[1], expected["text_encoder"])
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_only_what_is_needed_is_downloaded(remote, torch_networks, expected, kind):
    """Pickles are fetched for the networks that have nothing safer; other variants and the safety checker never."""
    if kind == "safetensors":
        (remote / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"large and not needed")
    else:
        (remote / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        options = {"max_shard_size": "20KB"} if kind == "shards" else {"safe_serialization": False}
        torch_networks["unet"].save_pretrained(remote / "unet", **options)
    folder = folders.resolve_pipeline("owner/model")
    for name in NETWORKS:
        assert_same(folders.load_component(folder, name)[1], expected[name])
    assert not any(path.read_bytes() == b"large and not needed" for path in folder.rglob("*") if path.is_file())
    assert (folder / "tokenizer" / "vocab.json").is_file() and folders.load_scheduler_config(folder)
