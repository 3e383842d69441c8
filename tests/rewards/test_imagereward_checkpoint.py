"""Loading by name, path and folder; the converted copy; the files that are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import imagereward_jax
from imagereward_jax.data import shapes
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.rewards import checkpoint
from imagereward_jax.rewards.imagereward import ImageReward, abstract_module
from imagereward_jax.weights import files, hub, mapping

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pickle_folder(tiny_reward, vocab_file, tmp_path, monkeypatch):
    """A folder with an ImageReward.pt as PyTorch writes it (position_ids included) and its vocabulary.

    The sizes of v1.0, which the loader takes for every pickle, are those of the tiny network meanwhile.
    """
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(checkpoint, "V1", tiny_reward.config)
    folder = tmp_path / "original"
    folder.mkdir()
    module = abstract_module(tiny_reward.config)
    tensors = {key: torch.from_numpy(np.array(v)) for key, v in mapping.to_torch(module, tiny_reward.params).items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save(tensors, folder / "ImageReward.pt")
    shutil.copy(vocab_file, folder / "vocab.txt")
    return folder


def assert_same_params(one, other):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


def forbid_torch(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was converted again")

    monkeypatch.setattr(files, "_read_pickle", refuse)


def test_the_second_load_reads_the_converted_copy(pickle_folder, tiny_reward, tmp_path, monkeypatch):
    path = pickle_folder / "ImageReward.pt"
    assert_same_params(imagereward_jax.load(path, download_root=tmp_path), tiny_reward)
    assert sorted(os.listdir(pickle_folder)) == ["ImageReward.pt", "vocab.txt"]
    forbid_torch(monkeypatch)
    assert_same_params(imagereward_jax.load(path, download_root=tmp_path), tiny_reward)
    assert_same_params(imagereward_jax.load(pickle_folder, download_root=tmp_path), tiny_reward)
    os.utime(path, ns=(1, 1))
    with pytest.raises(AssertionError, match="converted again"):
        imagereward_jax.load(path, download_root=tmp_path)


def test_a_replaced_pickle_and_a_damaged_copy_are_converted_anew(pickle_folder, tiny_reward, tmp_path):
    torch = pytest.importorskip("torch")
    path = pickle_folder / "ImageReward.pt"
    imagereward_jax.load(path, download_root=tmp_path)
    (copy,) = (tmp_path / "converted").iterdir()
    tensors = torch.load(path, weights_only=True)
    tensors["mlp.layers.7.bias"] += 1
    torch.save(tensors, path)
    changed = imagereward_jax.load(path, download_root=tmp_path)
    expected = np.asarray(tiny_reward.params["mlp"]["layers"][7]["bias"]) + 1
    np.testing.assert_array_equal(changed.params["mlp"]["layers"][7]["bias"], expected)
    copy.write_bytes(copy.read_bytes()[:500])
    assert_same_params(imagereward_jax.load(path, download_root=tmp_path), changed)
    assert copy.stat().st_size > 500


def test_the_copy_is_in_the_packages_own_folder(pickle_folder, tiny_reward, tmp_path):
    """Files beside the pickle stay as they are. If no copy can be kept, loading still works and warns once."""
    other = pickle_folder / "ImageReward.pt.safetensors"
    other.write_bytes(b"of another tool")
    before = sorted(os.listdir(pickle_folder))
    assert_same_params(imagereward_jax.load(pickle_folder, download_root=tmp_path / "root"), tiny_reward)
    assert sorted(os.listdir(pickle_folder)) == before and other.read_bytes() == b"of another tool"
    assert len(list((tmp_path / "root" / "converted").iterdir())) == 1
    (tmp_path / "occupied").write_text("a file, so that no folder can be made under it")
    with pytest.warns(UserWarning, match=r"cannot store a converted copy of .*ImageReward.pt") as caught:
        for _ in range(2):
            reward = imagereward_jax.load(pickle_folder, download_root=tmp_path / "occupied")
    assert len({str(w.message) for w in caught}) == 1
    assert_same_params(reward, tiny_reward)


def test_a_known_name_finds_what_the_original_downloaded(pickle_folder, tiny_reward):
    (pickle_folder / "med_config.json").write_text(json.dumps(tiny_reward.config.text.to_dict()))
    assert_same_params(imagereward_jax.load("ImageReward-v1.0", download_root=pickle_folder), tiny_reward)


def test_med_config_and_tokenizer_may_be_given(pickle_folder, vocab_file, tiny_reward, tmp_path):
    (pickle_folder / "vocab.txt").unlink()
    path, med_config = pickle_folder / "ImageReward.pt", tmp_path / "med.json"
    assert_same_params(imagereward_jax.load(path, tokenizer=vocab_file.parent), tiny_reward)
    med_config.write_text(json.dumps({**tiny_reward.config.text.to_dict(), "hidden_act": "relu"}))
    with pytest.raises(ValueError, match=r"med.json: hidden_act must be 'gelu'"):
        imagereward_jax.load(path, med_config=med_config, tokenizer=vocab_file)
    med_config.write_text(json.dumps({**tiny_reward.config.text.to_dict(), "intermediate_size": 47}))
    with pytest.raises(ValueError, match=r"intermediate.dense.bias: \(48,\) in the checkpoint, \(47,\) in the network"):
        imagereward_jax.load(path, med_config=med_config, tokenizer=vocab_file)


def test_unknown_names_are_answered_with_the_nearest(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "ImageReward-v1.0" in imagereward_jax.available_models()
    with pytest.raises(FileNotFoundError, match=r"no model 'imagereward'.*did you mean 'ImageReward-v1.0'"):
        imagereward_jax.load("imagereward")
    with pytest.raises(FileNotFoundError, match=r"/nowhere/ImageReward.pt: no such file or folder"):
        imagereward_jax.load("/nowhere/ImageReward.pt")


def test_folders_that_are_no_model_are_refused(tmp_path, tiny_reward_folder):
    with pytest.raises(FileNotFoundError, match=r"not a reward model; expected config.json and model.safetensors"):
        imagereward_jax.load(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_reward_folder, broken)
    (broken / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"broken/config.json: model_type must be 'imagereward'"):
        imagereward_jax.load(broken)
    shutil.copy(tiny_reward_folder / "config.json", broken)
    tensors = dict(files.read_tensors(tiny_reward_folder / "model.safetensors"))
    tensors["extra"] = tensors.pop("mlp.layers.7.bias")
    files.write_safetensors(broken / "model.safetensors", tensors)
    with pytest.raises(mapping.CheckpointMismatch, match=r"(?s)broken/model.safetensors.*mlp.layers.7.bias.*extra"):
        imagereward_jax.load(broken)
    (broken / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    files.write_safetensors(broken / "model.safetensors", files.read_tensors(tiny_reward_folder / "model.safetensors"))
    with pytest.raises(ValueError, match=r"the tokenizer has 7 tokens .* the network 93"):
        imagereward_jax.load(broken)


def test_a_missing_vocabulary_says_what_to_pass(pickle_folder, monkeypatch):
    (pickle_folder / "vocab.txt").unlink()

    def offline(*_, **__):
        raise hub.ModelNotFound("the hub could not be asked")

    monkeypatch.setattr(hub, "resolve_file", offline)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary: .*vocab.txt.* pass `tokenizer="):
        imagereward_jax.load(pickle_folder / "ImageReward.pt")


def test_a_built_in_reward_loads_by_its_name(tiny_reward_folder, tiny_reward, tmp_path, monkeypatch):
    shutil.copytree(tiny_reward_folder, tmp_path / "toy-world" / "reward")
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    assert imagereward_jax.available_models() == ["ImageReward-v1.0", "toy-world"]
    assert_same_params(imagereward_jax.load("toy-world"), tiny_reward)


def test_the_second_built_in_reward_is_a_reward_alone():
    """`tiny-shapes-v2` tells a right image from one with a wrong word, and is no text-to-image model."""
    rng = np.random.default_rng(0)
    captions = [shapes.Caption("large", colour, "circle", "center") for colour in ("red", "blue")]
    right, wrong = imagereward_jax.load("tiny-shapes-v2").score(
        captions[0].text, [shapes.draw(caption, rng, 32) for caption in captions]
    )
    assert right > wrong + 1
    assert "tiny-shapes-v2" not in hub.builtin_models()
    with pytest.raises(hub.ModelNotFound, match=r"'tiny-shapes-v2'.*Built-in models: tiny-shapes, tiny-shapes-sd3$"):
        open_pipeline("tiny-shapes-v2")


def test_the_convert_command(pickle_folder, tiny_reward, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "convert"))
    monkeypatch.delitem(sys.modules, "imagereward", raising=False)
    import imagereward as command

    source, out = str(pickle_folder / "ImageReward.pt"), tmp_path / "converted"
    assert command.main([source, str(out)]) == 0
    assert_same_params(imagereward_jax.load(out), tiny_reward)
    assert command.main([source, str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out} exists; pass --overwrite to replace the files in it\n"
    assert command.main([source, str(out), "--overwrite"]) == 0
    assert command.main([str(tmp_path / "gone.pt"), str(tmp_path / "new")]) == 2
    assert "gone.pt: no such file or folder" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_scoring_needs_no_heavy_package(tiny_reward_folder):
    """A converted folder is scored without PyTorch, diffusers, TensorFlow, datasets, Orbax or grain being imported."""
    program = (
        "import sys, numpy as np, imagereward_jax; assert 'jax' not in sys.modules\n"
        f"reward = imagereward_jax.load({str(tiny_reward_folder)!r})\n"
        "reward.score('a cat', np.zeros((32, 32, 3), np.uint8))\n"
        "heavy = {'torch', 'diffusers', 'tensorflow', 'datasets', 'orbax', 'grain', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_random_model_is_made_from_a_dict(tiny_reward_config, vocab_file):
    reward = ImageReward.from_config(tiny_reward_config.to_dict(), vocab_file, jax.random.key(0))
    assert reward.config == tiny_reward_config
    np.testing.assert_allclose(np.std(reward.params["blip"]["vision_proj"]["kernel"]), 0.02, rtol=0.1)


def test_a_reward_alone_is_packed_in_float16_as_the_package_has_it(tiny_reward_folder, tmp_path, capsys, monkeypatch):
    """convert/tiny_shapes.py: within float16's rounding; a folder that is no model is refused, and nothing written."""
    monkeypatch.syspath_prepend(str(ROOT / "convert"))
    monkeypatch.delitem(sys.modules, "tiny_shapes", raising=False)
    import tiny_shapes

    assert tiny_shapes.main([str(tiny_reward_folder), str(tmp_path / "packed")]) == 0
    packed = files.read_tensors(tmp_path / "packed/reward/model.safetensors")
    whole = files.read_tensors(tiny_reward_folder / "model.safetensors")
    assert packed.keys() == whole.keys() and {array.dtype.name for array in packed.values()} == {"float16"}
    for name, array in whole.items():
        np.testing.assert_allclose(packed[name], array, rtol=1e-3, atol=1e-7)
    for argv in ([str(tmp_path)], [str(tiny_reward_folder), "--reward", str(tiny_reward_folder)]):
        assert tiny_shapes.main([argv[0], str(tmp_path / "no"), *argv[1:]]) == 2
        assert "expected a diffusers folder" in capsys.readouterr().err and not (tmp_path / "no").exists()
