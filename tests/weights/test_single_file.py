"""Checkpoints of one file, against PyTorch diffusers' converters and settings."""

import functools
import json
import re
import sys
import types

import convert_scripts
import ml_dtypes
import numpy as np
import pytest
import single_files

from imagereward_jax.models import clip, mmdit_config, unet_config, vae
from imagereward_jax.pipelines import open_pipeline
from imagereward_jax.pipelines.families import FAMILIES
from imagereward_jax.rewards.tokens import CLIPPromptTokenizer
from imagereward_jax.weights import components, hub, mapping, stability_names
from imagereward_jax.weights import single_file_configs as configs
from imagereward_jax.weights.diffusers import load_component
from imagereward_jax.weights.files import WeightsError, read_tensors, write_safetensors

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
reference = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the reference is PyTorch diffusers")

KINDS = ("sd1", "sd2", "sdxl", "sd3")
convert = functools.partial(convert_scripts.run, "single_file")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    """(kind, the pipeline, its folder, the single file that was made of it, flags to open the file with)."""
    path = tmp_path_factory.mktemp(request.param)
    pipeline, params = single_files.make(request.param, path / "tokenizer")
    pipeline.save(path / "folder", params)
    convert(path / "folder", path / "model.safetensors")
    names = FAMILIES[pipeline.pipeline_class].text_encoders
    parts = ",".join(f"{names[encoder]}={path / 'tokenizer'}" for encoder in pipeline.tokenizers)
    options = {"parts": parts} | ({"prediction_type": "v_prediction"} if request.param == "sd2" else {})
    return request.param, pipeline, path / "folder", path / "model.safetensors", options


def by_diffusers(kind, name, pipeline, tensors):
    """A network's tensors as diffusers' converters read them."""
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in tensors.items()}
    config = pipeline.component_config(name)
    if name == "unet":
        return reference.convert_ldm_unet_checkpoint(tensors, config)
    if name == "transformer":
        return reference.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if name == "vae":
        return reference.convert_ldm_vae_checkpoint(tensors, config)
    if (kind, name) in (("sd2", "text_encoder"), ("sdxl", "text_encoder_2")):
        prefix = "cond_stage_model.model." if kind == "sd2" else "conditioner.embedders.1.model."
        found = reference.convert_open_clip_checkpoint(torch.nn.Module(), tensors | widths(config, prefix), prefix)
        return {key: value for key, value in found.items() if key in mapping.torch_layout(pipeline.networks[name])}
    prefix = f"text_encoders.clip_{'g' if name == 'text_encoder_2' else 'l'}.transformer."
    return reference.convert_ldm_clip_checkpoint(tensors, prefix if kind == "sd3" else None)


def widths(config, prefix):
    """diffusers' converter cuts the joint projections by the width of this matrix."""
    return {f"{prefix}text_projection": torch.zeros(config["hidden_size"], config["projection_dim"])}


def test_diffusers_reads_the_same_numbers_from_a_file(model):
    """Every tensor of every network, to the bit; and so do we, who also find the settings by the shapes."""
    kind, pipeline, folder, path, options = model
    opened = open_pipeline(path, **options)
    for name in pipeline.networks:
        _, expected = load_component(folder, name)
        found = by_diffusers(kind, name, pipeline, read_tensors(path))
        ours = opened.source.tensors(name, opened.networks[name])
        assert ours.keys() == expected.keys()
        # CLIP-L's identity is made by whoever reads the file.
        absent = {"text_projection.weight"} if name.startswith("text_encoder") else set()
        assert expected.keys() - found.keys() <= absent, name
        for key, array in expected.items():
            assert ours[key].tobytes() == array.tobytes(), f"{name} {key}"
            if key in found and key not in absent:
                assert found[key].reshape(array.shape).numpy().tobytes() == array.tobytes(), f"{name} {key}"
        free = {"architectures", "bos_token_id", "pad_token_id", "sample_size", "projection_dim"}
        settings, stated = (p.configs[name].to_dict() for p in (opened, pipeline))
        assert {key: value for key, value in settings.items() if key not in free} == {
            key: value for key, value in stated.items() if key not in free
        }
    assert opened.default_size == {"sd1": 64, "sd2": 96}.get(kind, 128) * 2
    assert opened.schedule.prediction_type == {"sd2": "v_prediction", "sd3": "flow_prediction"}.get(kind, "epsilon")


def test_there_and_back_is_exact(model, tmp_path):
    """Folder -> file -> folder -> file: the same bytes; a pickle and averaged weights are read as well."""
    _, pipeline, folder, path, options = model
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    convert(path, tmp_path / "folder", *flags)
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for name in pipeline.networks:
        assert load_component(tmp_path / "folder", name)[1].keys() == load_component(folder, name)[1].keys()


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
def test_a_pickle_and_averaged_weights(model, tmp_path, monkeypatch):
    """A .ckpt of PyTorch Lightning, whose callbacks name a class; variant="ema" reads LitEma's names."""
    _, pipeline, _, path, options = model
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in read_tensors(path).items()}
    own = [key for key in tensors if key.startswith("model.diffusion_model.")]
    for key in own:
        tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors[key] + 1
    tensors["model_ema.decay"] = torch.tensor(0.5)
    lightning = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    lightning.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": lightning.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", lightning.__name__):
        monkeypatch.setitem(sys.modules, name, lightning)
    checkpoint = {"state_dict": tensors, "global_step": 7, "callbacks": {lightning.ModelCheckpoint: {"best": None}}}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    monkeypatch.undo()
    plain, averaged = (open_pipeline(tmp_path / "model.ckpt", variant=variant, **options) for variant in (None, "ema"))
    network = pipeline.networks["unet"]
    one, other = (opened.source.tensors("unet", network) for opened in (plain, averaged))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key] + 1, other[key]) for key in one)
    with pytest.raises(WeightsError, match="no averaged weights"):
        open_pipeline(path, variant="ema", **options).load_params()
    with pytest.raises(ValueError, match="only 'ema'"):
        open_pipeline(path, variant="fp16", **options)


@pytest.mark.parametrize("model", ["sd1", "sdxl", "sd3"], indirect=True)
def test_parts_from_elsewhere(model, tmp_path):
    """A VAE apart, in Stability's and in diffusers' names, for a file without one and for a folder."""
    _, pipeline, folder, path, options = model
    tensors = read_tensors(path)
    own = {key: array for key, array in tensors.items() if key.startswith("first_stage_model.")}
    write_safetensors(tmp_path / "bare.safetensors", {key: a for key, a in tensors.items() if key not in own})
    with pytest.raises(ValueError, match=r"holds no vae: give .* vae=FILE"):
        open_pipeline(tmp_path / "bare.safetensors", **options)
    other = {key.removeprefix("first_stage_model."): array + 1 for key, array in own.items()}
    write_safetensors(tmp_path / "vae.safetensors", other)
    parts = f"{options['parts']},vae={tmp_path / 'vae.safetensors'}"
    opened = open_pipeline(tmp_path / "bare.safetensors", **options | {"parts": parts})
    assert opened.configs["vae"].scaling_factor == pipeline.configs["vae"].scaling_factor
    _, expected = load_component(folder, "vae")
    for source in (opened, open_pipeline(folder, parts=f"vae={tmp_path / 'vae.safetensors'}")):
        found = source.source.tensors("vae", source.networks["vae"])
        assert all(np.array_equal(found[key], array + 1) for key, array in expected.items())
        assert source.load_params({"vae": source.abstract_params()["vae"]})["vae"]
    diffusers_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    parts = f"{options['parts']},vae={diffusers_file}"
    opened = open_pipeline(tmp_path / "bare.safetensors", **options | {"parts": parts})
    found = opened.source.tensors("vae", opened.networks["vae"])
    assert all(np.array_equal(found[key], array) for key, array in expected.items())


def stored_shapes(name, kind, settings):
    """Shapes by Stability's names of a network of published sizes."""
    network = components.abstract_network(kind, settings)
    naming = {"unet": stability_names.unet, "transformer": stability_names.mmdit, "vae": stability_names.vae}.get(name)
    naming = naming or (stability_names.open_clip if settings.get("hidden_act") == "gelu" else stability_names.same)
    shapes = {}
    for key, leaf in mapping.torch_layout(network).items():
        origin, (rows, *rest) = naming(key, network.config), leaf.torch_shape
        shape = (rows * (1 if origin.third is None else 3), *rest, *((1, 1) if origin.convolution else ()))
        shapes[origin.key] = shape[::-1] if origin.transposed else shape
    return shapes, network.config


SD2_UNET = {
    "cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20],
}  # fmt: skip
PUBLISHED = {
    "sd1": ("unet", "UNet2DConditionModel", unet_config.SD1, configs.unet),
    "sd2": ("unet", "UNet2DConditionModel", SD2_UNET, configs.unet),
    "sdxl": ("unet", "UNet2DConditionModel", unet_config.SDXL, configs.unet),
    "sd3": ("transformer", "SD3Transformer2DModel", mmdit_config.SD3_MEDIUM, configs.mmdit),
    "sd35_medium": ("transformer", "SD3Transformer2DModel", mmdit_config.SD35_MEDIUM, configs.mmdit),
    "sd35_large": ("transformer", "SD3Transformer2DModel", mmdit_config.SD35_LARGE, configs.mmdit),
    "vae": ("vae", "AutoencoderKL", vae.SD1, configs.vae),
    "vae_sd3": ("vae", "AutoencoderKL", vae.SD3, configs.vae),
    "clip_l": ("text_encoder", "CLIPTextModel", clip.VIT_L, configs.clip),
    "clip_g": ("text_encoder_2", "CLIPTextModelWithProjection", clip.VIT_BIG_G, configs.open_clip),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_published_networks_show_in_their_shapes(name):
    part, kind, settings, read = PUBLISHED[name]
    shapes, stated = stored_shapes(part, kind, settings)
    free = ("architectures", "sample_size", "scaling_factor", "shift_factor", "bos_token_id", "pad_token_id")
    free += ("projection_dim",) if name == "clip_l" else ()
    found = type(stated).from_dict(read(shapes)).to_dict()
    for field, value in stated.to_dict().items():
        assert field in free or found[field] == value or set(np.ravel(found[field])) == set(np.ravel(value)), field


OTHERS = {
    "lora_unet_down_blocks_0.lora_down.weight": ((4, 4), "an adapter: pass it to --lora"),
    "control_model.input_hint_block.0.weight": ((4, 3, 3, 3), "a ControlNet"),
    "model.diffusion_model.input_blocks.0.0.weight": ((32, 9, 3, 3), "an inpainting model"),
    "conditioner.embedders.0.model.ln_final.weight": ((4,), "SDXL's refiner"),
    "emb_params": ((2, 64), "textual inversion"),
    "double_blocks.0.img_attn.norm.key_norm.scale": ((4,), "Flux"),
    "decoder.mid.block_1.conv1.weight": ((4, 4, 3, 3), "a vae alone: pass a model"),
    "text_model.embeddings.token_embedding.weight": ((4, 4), "a text_encoder alone"),
    "down_blocks.0.resnets.0.conv1.weight": ((4, 4, 3, 3), "one network of a diffusers folder"),
    "visual.conv1.weight": ((4, 3, 2, 2), "not a checkpoint of Stable Diffusion"),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight": ((1,), "fp8 with scales"),
}


@pytest.mark.parametrize("model", ["sd1"], indirect=True)
@pytest.mark.parametrize("key", OTHERS)
def test_other_kinds_are_refused_by_what_they_are(model, tmp_path, key):
    path = model[3]
    shape, message = OTHERS[key]
    tensors = {key: np.zeros(shape, np.float16)}
    if "input_blocks" in key:
        tensors = read_tensors(path) | tensors
    write_safetensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(WeightsError, match=re.escape(message)):
        open_pipeline(tmp_path / "other.safetensors")


def test_a_part_of_a_file_is_refused_with_a_way_out(tmp_path):
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }
    write_safetensors(tmp_path / "m.safetensors", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    with pytest.raises(WeightsError, match=r"m\.safetensors: its unet is not whole, or .*from_single_file\(FILE\)"):
        open_pipeline(str(tmp_path / "m.safetensors"))


def test_what_a_file_does_not_show_has_to_be_said(model):
    kind, _, _, path, options = model
    if kind == "sd2":
        with pytest.raises(ValueError, match="does not show what it predicts"):
            open_pipeline(path, parts=options["parts"])
    with pytest.raises(ValueError, match=r"not CLIP's 49408: give its folder as a part of the model, tokenizer="):
        open_pipeline(path, prediction_type=options.get("prediction_type"))
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt: no such file"):
        open_pipeline(path.with_name("absent.ckpt"))
    wrong = {
        "vea=x": "no such file",
        "vae=.": "is a folder",
        "vae": "expected NAME=PATH",
        f"vea={path}": "'vea' is no part",
    }
    for parts, message in wrong.items():
        with pytest.raises((ValueError, OSError), match=message):
            open_pipeline(path, parts=parts)


@pytest.mark.parametrize("model", ["sd3"], indirect=True)
def test_fp8_is_read_as_the_numbers_it_holds(model, tmp_path):
    """e4m3 without scales (T5 in files of SD 3.5): exact in bfloat16."""
    _, _, _, path, options = model
    tensors = {key: np.asarray(array) for key, array in read_tensors(path).items()}
    key = "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    tensors[key] = tensors[key].astype(ml_dtypes.float8_e4m3fn)
    write_safetensors(tmp_path / "fp8.safetensors", tensors)
    opened = open_pipeline(tmp_path / "fp8.safetensors", **options)
    network, name = opened.networks["text_encoder_2"], key.split("transformer.")[1]
    stored = opened.source.tensors("text_encoder_2", network)[name]
    assert stored.dtype == ml_dtypes.bfloat16
    assert np.array_equal(stored.astype(np.float32), tensors[key].astype(np.float32))
    params = opened.load_params({"text_encoder_2": opened.abstract_params()["text_encoder_2"]})["text_encoder_2"]
    assert np.array_equal(mapping.to_torch(network, params)[name], tensors[key].astype(np.float32))


def test_settings_that_a_file_cannot_hold_are_refused(tmp_path):
    assert "does not show in a single file" in convert("tiny-shapes", tmp_path / "out.safetensors", code=2)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_package_s_tokenizer_is_clip_s():
    """Its ids are those that the rewards' tokenizer makes of OpenAI's list."""
    from imagereward_jax.pipelines import prompt_ids, published_settings

    prompts = ["a photo of a cat, 4k", "“Crème brûlée” in the style of Escher"]
    wide = {"vocab_size": 49408}
    theirs = CLIPPromptTokenizer(hub.ASSETS / "bpe_simple_vocab_16e6.txt.gz", 77, cleaning="transformers")(prompts)
    for pipeline_class, encoder, pad in (
        ("StableDiffusionPipeline", "text_encoder", 49407), ("StableDiffusionXLPipeline", "text_encoder_2", 0),
    ):  # fmt: skip
        folder = published_settings.tokenizer(pipeline_class, "tokenizer", encoder, {encoder: wide}, download=False)
        ids = prompt_ids.encode(prompt_ids.open_tokenizer(folder, encoder, 49408, "CLIPTextModel"), prompts, 77)
        used = np.arange(77) <= (theirs["input_ids"] == 49407).argmax(1)[:, None]
        assert np.array_equal(ids[used], theirs["input_ids"][used]) and (ids[~used] == pad).all()
        assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 77
