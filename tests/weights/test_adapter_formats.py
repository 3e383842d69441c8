"""Adapters in the names and formats of many programs, against diffusers' converters, PEFT and closed forms."""

import adapter_files
import jax
import numpy as np
import pytest
import single_files
import tiny_sd3
from adapter_files import random

from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.models import lora
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.weights import adapters, mapping, single_file
from imagereward_jax.weights.adapter_updates import Factors, LowRank, change
from imagereward_jax.weights.files import WeightsError, write_safetensors

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
peft = pytest.importorskip("peft", reason="the reference is PyTorch PEFT")
reference = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the reference is PyTorch diffusers")

RANK = 2
SPELLINGS = {  # (name of the layer, of its down weight, of its up weight) by Stability's name
    "kohya": lambda layer: (f"lora_unet_{layer.replace('.', '_')}", "lora_down", "lora_up"),
    "ComfyUI": lambda layer: (f"diffusion_model.{layer}", "lora_A", "lora_B"),
}


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def model(request, tmp_path_factory):
    """(pipeline, params, the denoiser's tensors under Stability's names)."""
    pipeline, params = single_files.make(request.param, tmp_path_factory.mktemp("tokenizer"))
    network = pipeline.networks[pipeline.denoiser]
    own = mapping.to_torch(network, params[pipeline.denoiser])
    stored = single_file.to_single_file(pipeline.pipeline_class, {pipeline.denoiser: (network, own)})
    return pipeline, params, {key.removeprefix("model.diffusion_model."): array for key, array in stored.items()}


@pytest.mark.parametrize("program", SPELLINGS)
def test_every_layer_under_stability_s_names_is_merged_as_diffusers_converts_it(model, tmp_path, program):
    """Adapting every matrix and convolution of the file, then diffusers' converter: what we merge into the converted
    weights, within 1e-5. Fused projections, swapped halves, convolutions and embeddings are among them."""
    pipeline, params, stored = model
    rng, tensors, adapted = np.random.default_rng(0), {}, {}
    for key, weight in stored.items():
        layer = key.removesuffix(".weight")
        if not key.endswith(".weight") or weight.ndim not in (2, 4):
            adapted[key] = weight
            continue
        down, up = random(rng, RANK, *weight.shape[1:]), random(rng, weight.shape[0], RANK)
        delta = np.tensordot(up, down, 1)
        name, *halves = SPELLINGS[program](layer)
        pair = down, up if weight.ndim == 2 else up[..., None, None]
        tensors |= {f"{name}.{half}.weight": array for half, array in zip(halves, pair)}
        if program == "kohya":
            tensors[f"{name}.alpha"] = np.float32(1)
        adapted[key] = weight + delta * (0.5 if program == "kohya" else 1)
    path = tmp_path / "adapter.safetensors"
    write_safetensors(path, tensors)
    adapter = adapters.read_adapter(path, pipeline.networks)
    name = pipeline.denoiser
    merged = adapters.merge(pipeline.networks, params, adapter)[name]
    found = mapping.to_torch(pipeline.networks[name], merged)
    whole = {f"model.diffusion_model.{key}": torch.from_numpy(array) for key, array in adapted.items()}
    if name == "unet":
        expected = reference.convert_ldm_unet_checkpoint(whole, pipeline.component_config(name))
    else:
        expected = reference.convert_sd3_transformer_checkpoint_to_diffusers(whole)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(found[key], array.numpy(), atol=1e-5, err_msg=key)
    assert len(adapter[name]) == len(lora.slots(pipeline.networks[name]))


def test_an_adapter_of_sd3_is_one_image_in_every_form_and_in_diffusers(tmp_path):
    """Our export, its copies in the forms of other programs, and diffusers' pipeline with our export: within 1e-5; in
    diffusers within 1e-4 (it rounds to float32 in another order)."""
    pipe = tiny_sd3.make(tmp_path / "tokenizers", with_t5=False)
    pipe.save_pretrained(tmp_path / "model")
    pipeline, params = load_pipeline(tmp_path / "model")
    targets = {"transformer": pipeline.lora_targets}
    forms = adapter_files.forms_of_sd3(adapter_files.exported(tmp_path, pipeline, targets, rank=RANK, alpha=4.0))
    for name, tensors in forms.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    sampler = make_sampler("euler", pipeline.scheduler_config, 2)
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 16)).astype(np.float32)
    ids = pipeline.tokenize(["a red square"])
    draw = jax.jit(lambda params: pipeline.sample(params, ids, None, noise, sampler=sampler))

    def image(path):
        return np.asarray(
            draw(adapters.merge(pipeline.networks, params, adapters.read_adapter(path, pipeline.networks)))
        )

    expected = image(tmp_path / adapters.FILE)
    assert np.abs(expected - np.asarray(draw(params))).max() > 0.01
    for name in forms:
        np.testing.assert_allclose(image(tmp_path / f"{name}.safetensors"), expected, atol=1e-5, err_msg=name)
    pipe.load_lora_weights(tmp_path, weight_name=adapters.FILE)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    size = {"height": 16, "width": 16, "output_type": "np"}
    theirs = pipe("a red square", num_inference_steps=2, guidance_scale=1.0, latents=latents, **size).images
    np.testing.assert_allclose(theirs, expected, atol=1e-4)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return single_files.make("sd1", tmp_path_factory.mktemp("tokenizer"))


def test_attention_processors_of_2023(sd1, tmp_path):
    """`ATTENTION.processor.to_q_lora.down.weight`, with "unet.", the text encoder of that age, and bare."""
    pipeline, _ = sd1
    rng, modern = np.random.default_rng(0), {}
    for network in ("unet", "text_encoder"):
        layout = mapping.torch_layout(pipeline.networks[network])
        for name in lora.slots(pipeline.networks[network]):
            out, features, *_ = layout[f"{name}.weight"].torch_shape
            if ".attn1.to_" in name or ".self_attn." in name:
                modern[f"{network}.{name}.lora.down.weight"] = random(rng, RANK, features)
                modern[f"{network}.{name}.lora.up.weight"] = random(rng, out, RANK)
    old = adapter_files.of_2023(modern)
    assert {key.rsplit(".to_", 1)[1] for key in old} == {
        f"{letter}_lora.{half}.weight" for letter in ("q", "k", "v", "out") for half in ("down", "up")
    }
    bare = {key.removeprefix("unet."): array for key, array in old.items() if key.startswith("unet.")}
    read = []
    for name, tensors in {"modern": modern, "old": old, "bare": bare}.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        read.append(adapters.read_adapter(tmp_path / f"{name}.safetensors", pipeline.networks))
    assert {network: len(layers) for network, layers in read[1].items()} == {"unet": 6 * 4, "text_encoder": 2 * 4}
    for other in read[1:]:
        for network, layers in other.items():
            for name, update in layers.items():
                np.testing.assert_array_equal(update.delta(), read[0][network][name].delta())


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


def by_peft(config, weight):
    """(tensors of a random adapter on a layer with this weight, as in PEFT's folders; the weight with it merged)."""
    out, features, *space = weight.shape
    layer = torch.nn.Conv2d(features, out, space[0], padding=1) if space else torch.nn.Linear(features, out)
    layer.weight.data = torch.from_numpy(np.array(weight))
    model = peft.get_peft_model(torch.nn.ModuleDict({"layer": layer}), config)
    tensors = adapter_files.randomised(model)
    return tensors, model.merge_and_unload()["layer"].weight.detach().numpy()


FORMATS = {
    "LoHa": lambda tucker: peft.LoHaConfig(r=3, alpha=2, target_modules=["layer"], use_effective_conv2d=tucker),
    "LoKr": lambda tucker: peft.LoKrConfig(r=3, alpha=2, target_modules=["layer"], use_effective_conv2d=tucker),
    "LoKr of two small factors": lambda tucker: peft.LoKrConfig(
        r=3, alpha=2, target_modules=["layer"], decompose_both=True, use_effective_conv2d=tucker
    ),
    "DoRA": lambda tucker: peft.LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_dora=True),
}  # fmt: skip


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("layer", [LAYER, CONV])
@pytest.mark.parametrize("kind", FORMATS)
def test_lycoris_and_dora_are_merged_as_by_peft(sd1, tmp_path, kind, layer, tucker):
    """On a projection and a convolution, within 1e-5; `generate` merges in the same way. Training cannot continue."""
    pipeline, params = sd1
    network = pipeline.networks["unet"]
    weight = mapping.to_torch(network, params["unet"])[f"{layer}.weight"]
    found, expected = by_peft(FORMATS[kind](tucker), weight)
    tensors = {key.replace(".layer.", f".{layer}."): array for key, array in found.items()}
    write_safetensors(tmp_path / "x.safetensors", adapter_files.lycoris(tensors, alpha=2))
    adapter = adapters.read_adapter(tmp_path / "x.safetensors", pipeline.networks)
    merged = adapters.merge(pipeline.networks, params, adapter)["unet"]
    np.testing.assert_allclose(mapping.to_torch(network, merged)[f"{layer}.weight"], expected, atol=1e-5)
    with pytest.raises(WeightsError, match="only plain LoRA; merge it"):
        adapters.low_rank_params(network, adapter["unet"], rank=3, alpha=3.0, what="x")


def test_dora_over_columns_and_a_tucker_core(sd1, tmp_path):
    """LyCORIS's own: lengths [1, in, 1, 1] over columns, and lora_mid. Closed forms, within 1e-6."""
    rng = np.random.default_rng(0)
    weight, down, up, core = (random(rng, *shape) for shape in ((6, 4, 3, 3), (2, 4, 1, 1), (6, 2, 1, 1), (2, 2, 3, 3)))
    lengths = 1 + np.abs(random(rng, 1, 4, 1, 1))
    update = LowRank(down, up, 0.5, core, lengths)
    delta = 0.5 * np.einsum("abhw,oa,bi->oihw", core, up[..., 0, 0], down[..., 0, 0])
    np.testing.assert_allclose(update.delta(), delta, atol=1e-6)
    merged = weight + change(update, weight)
    np.testing.assert_allclose(np.sqrt((merged**2).sum((0, 2, 3))), lengths.ravel(), atol=1e-6)
    assert Factors("full difference", {"diff": weight}, 1.0, weight.shape).delta() is not weight


UNREAD = {
    "lora_unet_x.oft_blocks": "OFT",
    f"unet.{LAYER}.on_input": r"\(IA\)3",
    "emb_params": "textual inversion",
    f"lora_unet_{LAYER.replace('.', '_')}.diff_b": "differences of biases",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "Flux",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "layers that this model lacks",
}


@pytest.mark.parametrize("key", UNREAD)
def test_what_is_not_read_is_named(sd1, tmp_path, key):
    write_safetensors(tmp_path / "x.safetensors", {key: np.zeros((2, 2), np.float32)})
    with pytest.raises(WeightsError, match=UNREAD[key]):
        adapters.read_adapter(tmp_path / "x.safetensors", sd1[0].networks)
