"""Names and links that a model's files hold lead nowhere but into the model."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from imagereward_jax.storage.folders import StorageError
from imagereward_jax.storage.names import single_name
from imagereward_jax.weights import diffusers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "a\\b", "", ".", "..", "a\0b", None, 5, ["a"]])
def test_a_path_is_no_name(name):
    with pytest.raises(StorageError, match=re.escape(f"x.json: tokenizers: {name!r} should be a name of a file")):
        single_name(name, "x.json: tokenizers")
    assert single_name("..a b", "x.json: tokenizers") == "..a b"


@pytest.mark.parametrize(
    ("field", "value"),
    [("tokenizers", ["../dot_ssh"]), ("components", {"../unet": {}}), ("bytes", {"unet/../../x": 1})],
)
def test_a_manifest_that_names_a_path_is_refused_before_anything_is_written(tmp_path, capsys, field, value):
    spec = importlib.util.spec_from_file_location("to_diffusers", ROOT / "convert/to_diffusers.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    objects = {name: {} for name in ("components", "bytes", "scheduler", "fields")}
    manifest = {"format": "imagereward-jax pipeline 3", **objects, "tokenizers": [], field: value}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/checkpoint.json").write_text(json.dumps(manifest))
    assert script.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert re.match(rf"error: {tmp_path}/in/checkpoint\.json: {field}: .*'.*\.\..*' should be", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["in"]


def test_an_index_that_names_a_path_is_refused(tmp_path):
    """Components of model_index.json, and shards of weights."""
    (tmp_path / "model_index.json").write_text('{"../unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(StorageError, match=r"model_index\.json: component: '\.\./unet' should be"):
        diffusers.read_index(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../x.safetensors", "b": "x.safetensors"}}')
    with pytest.raises(StorageError, match=r"index\.json: weight_map: '\.\./\.\./x\.safetensors' should be"):
        diffusers.load_component(tmp_path, "unet")


def tokenizer(folder):
    """A model's folder with a tokenizer, and what else may lie in it."""
    (folder / "tokenizer").mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "evil.sh"):
        (folder / "tokenizer" / name).write_text(name)
    return folder / "tokenizer"


def test_only_the_files_of_a_tokenizer_are_copied(tmp_path):
    source = tokenizer(tmp_path / "model")
    os.mkfifo(source / "added_tokens.json")
    (tmp_path / "link").symlink_to(tmp_path / "model")  # a link to a whole model is its user's
    (source / "spiece.model").symlink_to("vocab.json")
    diffusers.copy_tokenizer(tmp_path / "link/tokenizer", tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["merges.txt", "spiece.model", "vocab.json"]
    assert not (tmp_path / "copy/spiece.model").is_symlink()


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_link_out_of_the_model_is_refused(tmp_path, linked):
    source, secret = tokenizer(tmp_path / "model"), tmp_path / "secret"
    if linked == "file":
        secret.write_text("private key")
        (source / "vocab.json").unlink()
        (source / "vocab.json").symlink_to("../../secret")
    else:
        source.rename(secret)
        source.symlink_to(secret)
    with pytest.raises(StorageError, match=rf"tokenizer/vocab\.json is a link to {secret}\S*, outside of \S*/model;"):
        diffusers.copy_tokenizer(source, tmp_path / "copy")
    assert not (tmp_path / "copy/vocab.json").exists()


def test_the_hubs_cache_is_made_of_links(tmp_path):
    """Files in snapshots/REVISION are links to blobs/HASH of their repository, and of no other."""
    blobs = tmp_path / "models--owner--name/blobs"
    blobs.mkdir(parents=True)
    source = tokenizer(tmp_path / "models--owner--name/snapshots/0123abc")
    (source / "vocab.json").rename(blobs / "9f86d0")
    (source / "vocab.json").symlink_to("../../../blobs/9f86d0")
    diffusers.copy_tokenizer(source, tmp_path / "copy")
    assert (tmp_path / "copy/vocab.json").read_text() == "vocab.json"
    (blobs / "9f86d0").rename(tmp_path / "models--owner--name/other")
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to("../../../other")
    with pytest.raises(StorageError, match="outside of"):
        diffusers.copy_tokenizer(source, tmp_path / "copy")
