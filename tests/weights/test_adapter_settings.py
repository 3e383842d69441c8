"""An adapter's scale from PEFT's settings, against PEFT itself: adapter_config.json and diffusers' header."""

import json
import shutil

import numpy as np
import pytest
import tiny_sd1

from imagereward_jax.weights import adapters
from imagereward_jax.weights.files import WeightsError, read_tensors, write_safetensors

diffusers = pytest.importorskip("diffusers", reason="PEFT adapts its network")
peft = pytest.importorskip("peft", reason="the reference is PyTorch PEFT")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sd1.make_one_level(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture(scope="module")
def peft_folder(pipeline, tmp_path_factory):
    """(folder, {layer: PEFT's update}) of an adapter that PEFT's own save_pretrained wrote."""
    path = tmp_path_factory.mktemp("peft_folder")
    unet = diffusers.UNet2DConditionModel.from_config(pipeline.component_config("unet"))
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["to_q", "to_v", "conv2"], init_lora_weights=False,
        rank_pattern={"attn2.to_v": 2}, alpha_pattern={r"attn1\.to_q": 3, "to_q": 8},
    )  # fmt: skip
    model = peft.get_peft_model(unet, config)
    model.save_pretrained(path)
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    return path, {name: layer.get_delta_weight("default").detach().numpy() for name, layer in layers.items()}


@pytest.fixture(scope="module")
def diffusers_tensors(peft_folder):
    """The same adapter's tensors under the names of diffusers."""
    tensors = read_tensors(peft_folder[0] / "adapter_model.safetensors")
    return {key.replace("base_model.model", "unet"): array for key, array in tensors.items()}


def test_a_folder_of_peft_s_has_the_scale_of_its_config(pipeline, peft_folder):
    """Each layer's update is PEFT's: lora_alpha, and ranks and alphas of its own for some layers."""
    path, updates = peft_folder
    read = adapters.read_adapter(path, pipeline.networks)["unet"]
    assert read.keys() == updates.keys()
    assert {round(low_rank.scale, 4) for low_rank in read.values()} == {0.75, 2.0, 4.0, 8.0}
    for name, low_rank in read.items():
        np.testing.assert_allclose(low_rank.delta(), updates[name], rtol=1e-4, atol=1e-5)


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora=True, but layer .* has no lora_magnitude_vector"),
    "LoHa": ({"peft_type": "LOHA"}, "peft_type='LOHA': only LoRA is implemented"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': it changes the base model too"),
    "null": ({"lora_alpha": None}, "lora_alpha=None should be a number"),
    "NaN": ({"lora_alpha": float("nan")}, r".*(nan should be a number|NaN, which JSON has not)"),
    "rank": ({"r": 8}, r"states rank 8 for layer .*, whose weights have rank 4: it belongs to another"),
    "list": ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] should map names of layers to numbers"),
    "text": ({"rank_pattern": {"to_q": "4"}}, "rank_pattern=.* should map names of layers to numbers"),
    "regex": ({"alpha_pattern": {"to_[qk]": 1}}, r"alpha_pattern has the regular expression 'to_\[qk\]'; .*write out"),
    # Python's re needs hours to see that this one does not match a layer's name.
    "ReDoS": ({"alpha_pattern": {r"(\w+\.?)+x!": 5}}, "alpha_pattern has the regular expression"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_settings_that_cannot_be_followed_are_refused(pipeline, peft_folder, diffusers_tensors, tmp_path, kind):
    """In adapter_config.json, and in the header of a file that diffusers wrote."""
    fields, message = REFUSED[kind]
    settings = json.loads((peft_folder[0] / "adapter_config.json").read_text()) | fields
    shutil.copy(peft_folder[0] / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=rf"adapter_config\.json: {message}"):
        adapters.read_adapter(tmp_path, pipeline.networks)
    header = {f"unet.{name}": value for name, value in settings.items()}
    write_safetensors(tmp_path / "x.safetensors", diffusers_tensors, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(WeightsError, match=rf"x\.safetensors: lora_adapter_metadata in its header: {message}"):
        adapters.read_adapter(tmp_path / "x.safetensors", pipeline.networks)


def test_a_file_of_peft_s_without_its_config_is_refused(pipeline, peft_folder, tmp_path):
    """Its scale is in no tensor; taken for the rank, the update would be four times too weak."""
    shutil.copy(peft_folder[0] / "adapter_model.safetensors", tmp_path / "renamed.safetensors")
    with pytest.raises(WeightsError, match=r"renamed\.safetensors: PEFT wrote it .* in adapter_config\.json; put that"):
        adapters.read_adapter(tmp_path, pipeline.networks)


def test_a_broken_header_is_refused(pipeline, diffusers_tensors, tmp_path):
    texts = {"{": " is not valid JSON", "[" * 100_000: " is not valid JSON", "null": ": expected a JSON object"}
    for text, why in texts.items():
        write_safetensors(tmp_path / "x.safetensors", diffusers_tensors, {"lora_adapter_metadata": text})
        with pytest.raises(WeightsError, match=rf"x\.safetensors: lora_adapter_metadata in its header{why}"):
            adapters.read_adapter(tmp_path / "x.safetensors", pipeline.networks)


def test_rslora_divides_by_the_root_of_the_rank(pipeline, diffusers_tensors, tmp_path):
    header = json.dumps({"unet.lora_alpha": 3, "unet.use_rslora": True})
    write_safetensors(tmp_path / "rs.safetensors", diffusers_tensors, {"lora_adapter_metadata": header})
    for low_rank in adapters.read_adapter(tmp_path / "rs.safetensors", pipeline.networks)["unet"].values():
        assert np.isclose(low_rank.scale, 3 / low_rank.rank**0.5)
