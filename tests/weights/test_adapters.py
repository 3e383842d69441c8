"""Adapter files against diffusers and PEFT: what is written there is read here and the other way round."""

import functools
import re
import types

import adapter_files
import convert_scripts
import jax
import numpy as np
import pytest
import tiny_sd1
import tiny_sdxl
from flax import nnx
from PIL import Image

from imagereward_jax import generate
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.models import lora
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.unet import UNet2DConditionModel
from imagereward_jax.models.unet_config import UNet2DConditionConfig
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.weights import adapters, mapping
from imagereward_jax.weights.adapter_names import layer_aliases
from imagereward_jax.weights.files import WeightsError, read_metadata, read_tensors, write_safetensors

torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
peft = pytest.importorskip("peft", reason="the reference is PyTorch PEFT")

TARGETS = lora.ATTENTION + r"|proj_in|resnets\.\d+\.conv1"
PROMPT = "a small blue cross in the center"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as `save` writes it."""
    return tiny_sd1.save_one_level(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def base(folder):
    """(pipeline, params) without adapter."""
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def adapted(folder):
    """(pipeline, params) with a random adapter of rank 3 and alpha 2 in its slots, and its low-rank parameters."""
    pipeline, params = load_pipeline(folder)
    pipeline = pipeline.with_lora("unet", TARGETS, rank=3, alpha=2.0)
    rng = np.random.default_rng(0)
    shapes = mapping.params_of(pipeline.networks["unet"], lora.LoRAParam)
    own = {"unet": jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), shapes)}
    return pipeline, join(params, own), own


@pytest.fixture(scope="module")
def exported(adapted, tmp_path_factory):
    """The folder of the adapter, written here."""
    pipeline, _, own = adapted
    path = tmp_path_factory.mktemp("exported")
    adapters.write_adapter(path, pipeline.networks, own, rank=3, alpha=2.0)
    return path


@pytest.fixture(scope="module")
def made_by_peft(folder, tmp_path_factory):
    """The folder of another adapter, of rank 2, which diffusers saved from PEFT's layers."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_v", "ff.net.0.proj", "conv2"], init_lora_weights="gaussian",
        alpha_pattern={"attn1.to_q": 1},
    )  # fmt: skip
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for weight in (weight for weight in unet.parameters() if weight.requires_grad):
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("peft")
    diffusers.StableDiffusionPipeline.save_lora_weights(
        path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return path


def torch_pipeline(folder, *loras):
    """diffusers' pipeline with adapters [(path, weight)]."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for index, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=str(index))
    if loras:
        pipe.set_adapters([str(index) for index in range(len(loras))], [weight for _, weight in loras])
    return pipe


NOISE = np.random.default_rng(5).standard_normal((1, 8, 8, 4)).astype(np.float32)


def torch_picture(pipe):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    latents = torch.from_numpy(np.moveaxis(NOISE, -1, 1).copy())
    return pipe(PROMPT, latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="np").images


def picture(pipeline, params):
    sampler = make_sampler("ddim", pipeline.scheduler_config, 3)
    ids, negative = pipeline.tokenize([PROMPT]), pipeline.tokenize([""])
    return jax.jit(lambda p: pipeline.sample(p, ids, negative, NOISE, sampler=sampler, guidance_scale=3.0))(params)


def merged(base, *loras):
    """The base's weights with adapters [(path, weight)] added."""
    pipeline, params = base
    for path, weight in loras:
        params = adapters.merge(pipeline.networks, params, adapters.read_adapter(path, pipeline.networks), weight)
    return params


def test_an_exported_adapter_gives_the_same_picture_in_diffusers(folder, base, adapted, exported):
    """Unmerged here and merged here within 1e-5; there within 1e-4; the adapter changes the picture far more."""
    ours = picture(*adapted[:2])
    without = picture(*base)
    assert np.abs(ours - without).mean() > 0.02
    np.testing.assert_allclose(picture(base[0], merged(base, (exported, 1.0))), ours, atol=1e-5)
    theirs = torch_picture(torch_pipeline(folder, (exported, 1.0)))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_adapters_made_by_peft_and_sums_of_several(folder, base, exported, made_by_peft):
    """Within 1e-4 of diffusers' pictures: one of PEFT's with an alpha of its own for some layers, and two at once
    with weights."""
    for loras in ([(made_by_peft, 1.0)], [(made_by_peft, 0.7), (exported, -0.4)]):
        theirs = torch_picture(torch_pipeline(folder, *loras))
        np.testing.assert_allclose(picture(base[0], merged(base, *loras)), theirs, atol=1e-4)


@pytest.mark.parametrize(("alpha", "tolerance"), [(2.0, 2e-7), (6.0, 0.0)], ids=["rounded", "to the bit"])
def test_training_goes_on_from_its_own_export(adapted, tmp_path, alpha, tolerance):
    """Low-rank parameters read again: A to the bit, B but for the rounding of alpha / rank, which a power of two has
    none of. Under another alpha, B differs and the update is the same."""
    unet, own = adapted[0].networks["unet"], adapted[2]["unet"]
    adapters.write_adapter(tmp_path, adapted[0].networks, {"unet": own}, rank=3, alpha=alpha)
    layers = adapters.read_adapter(tmp_path / adapters.FILE, adapted[0].networks)["unet"]
    again = adapters.low_rank_params(unet, layers, rank=3, alpha=alpha, what="it")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance), again, own)
    other = mapping.to_torch(unet, adapters.low_rank_params(unet, layers, rank=3, alpha=5.0, what="it"), lora.LoRAParam)
    for name, low_rank in layers.items():
        up = other[f"{name}.lora_B.weight"]
        np.testing.assert_allclose(5 / 3 * up, low_rank.scale * low_rank.up, rtol=1e-6)


def test_an_export_needs_no_header(adapted, exported):
    """Readers that know nothing of alpha in a header (diffusers 0.27, ComfyUI, web UIs) add `up @ down` as the tensors
    of a file without alpha stand. That is the update which was trained, of rank 3 and alpha 2."""
    tensors, own = (
        read_tensors(exported / adapters.FILE),
        mapping.to_torch(adapted[0].networks["unet"], adapted[2]["unet"], lora.LoRAParam),
    )
    assert tensors.keys() == {f"unet.{key}" for key in own}
    assert read_metadata(exported / adapters.FILE) == {"format": "pt"}
    for key in (key.removesuffix("lora_A.weight") for key in own if key.endswith("lora_A.weight")):
        seen, trained = (
            np.einsum("or...,ri...->oi...", up.astype(np.float64), down)
            for up, down in (
                (tensors[f"unet.{key}lora_B.weight"], tensors[f"unet.{key}lora_A.weight"]),
                (own[f"{key}lora_B.weight"] * (2 / 3), own[f"{key}lora_A.weight"]),
            )
        )
        np.testing.assert_allclose(seen, trained, rtol=1e-5, atol=1e-7)


def kohya(exported):
    """An exported adapter as kohya's sd-scripts write it, at half its scale, with layers of the text encoder."""
    tensors = read_tensors(exported / adapters.FILE) | adapter_files.random_text_layers()
    return adapter_files.kohya(tensors, scale=0.5)


def test_a_kohya_file_says_the_same_as_peft_s_and_as_in_diffusers(folder, base, exported, tmp_path):
    """The UNet's layers to the bit; the weights that diffusers fuses from the file within 1e-6, text encoder too."""
    pipeline, params = base
    adapter = adapters.read_adapter(exported, pipeline.networks)
    write_safetensors(tmp_path / "kohya.safetensors", kohya(exported))
    read = adapters.read_adapter(tmp_path / "kohya.safetensors", pipeline.networks)
    assert read["unet"].keys() == adapter["unet"].keys()
    for name, low_rank in adapter["unet"].items():
        np.testing.assert_array_equal(read["unet"][name].down, low_rank.down)
        np.testing.assert_array_equal(read["unet"][name].up * read["unet"][name].scale, low_rank.up)
    pipe = torch_pipeline(folder, (tmp_path / "kohya.safetensors", 1.0))
    assert_fused_alike(pipe, pipeline, params, read, 0.8)


def test_a_whole_number_may_be_an_alpha(base, exported, tmp_path):
    """kohya writes alpha=16 as an integer tensor where nothing converts it."""
    pipeline, _ = base
    tensors = kohya(exported)
    for scalar in (np.float32(2), np.int64(2)):
        written = {key: scalar if key.endswith(".alpha") else array for key, array in tensors.items()}
        write_safetensors(tmp_path / f"{scalar.dtype}.safetensors", written)
    names = ("float32", "int64")
    float_, whole = (adapters.read_adapter(tmp_path / f"{name}.safetensors", pipeline.networks) for name in names)
    assert [low_rank.scale for low_rank in whole["unet"].values()] == [one.scale for one in float_["unet"].values()]


def assert_fused_alike(pipe, pipeline, params, adapter, weight):
    """The weights that diffusers fuses from the adapter that `pipe` has loaded are those of `merge`."""
    pipe.fuse_lora(components=list(adapter), lora_scale=weight)
    ours = adapters.merge(pipeline.networks, params, adapter, weight)
    for name in adapter:
        theirs = {
            re.sub(r"\.base_layer", "", key): array.numpy()
            for key, array in getattr(pipe, name).state_dict().items()
            if "lora_" not in key
        }
        expected = mapping.to_torch(pipeline.networks[name], ours[name])
        before = mapping.to_torch(pipeline.networks[name], params[name])
        changed = 0
        for key, array in expected.items():
            np.testing.assert_allclose(theirs[_there(theirs, key)], array, atol=1e-6, err_msg=key)
            changed += not np.array_equal(array, before[key])
        assert changed == len(adapter[name])


def _there(tensors, key):
    """transformers 5 leaves `text_model.` out of the keys."""
    return key if key in tensors else key.removeprefix("text_model.")


def test_block_numbers_of_sdxl_are_diffusers():
    """Every layer of SDXL's transformers under Stability's block numbers, against diffusers' own conversion."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    config = UNet2DConditionConfig(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 2, 4),
        use_linear_projection=True,
    )
    unet = mapping.abstract(lambda: UNet2DConditionModel(config, rngs=nnx.Rngs(0)))
    aliases = layer_aliases({"unet": unet})
    numbered = {
        alias: targets[0].layer
        for alias, targets in aliases.items()
        if re.match("lora_unet_(middle_block|(in|out)put_blocks)_", alias) and ".attentions." in targets[0].layer
    }
    assert len(numbered) == sum(".attentions." in name for name in lora.slots(unet))
    state = {f"{alias}.lora_down.weight": name for alias, name in numbered.items()}
    theirs = _maybe_map_sgm_blocks_to_diffusers(state, types.SimpleNamespace(layers_per_block=config.layers_per_block))
    assert len(theirs) == len(numbered)
    for key, name in theirs.items():
        for stability, diffusers_name in (("input", "down"), ("output", "up")):
            key = key.replace(f"{stability}_blocks", f"{diffusers_name}_blocks")
        key = key.replace("middle_block", "mid_block")
        assert key == f"lora_unet_{name.replace('.', '_')}.lora_down.weight"


def test_generate_with_an_adapter_is_generate_with_the_merged_model(folder, exported, made_by_peft, tmp_path):
    """Two adapters with weights on the command line; the pixels are those of the model that merge_lora.py wrote."""
    merge = functools.partial(convert_scripts.run, "merge_lora")
    assert "layers adapted" in merge(folder, exported, tmp_path / "one", "--weight", "0.5")
    merge(tmp_path / "one", made_by_peft, tmp_path / "both")
    common = ["--prompt", PROMPT, "--steps", "3", "--guidance-scale", "1"]
    loras = ["--lora", f"{exported}:0.5", "--lora", str(made_by_peft / adapters.FILE)]
    assert generate.main(["--model", str(folder), "--out", str(tmp_path / "a"), *loras, *common]) == 0
    assert generate.main(["--model", str(tmp_path / "both"), "--out", str(tmp_path / "b"), *common]) == 0
    assert generate.main(["--model", str(folder), "--out", str(tmp_path / "c"), *common]) == 0
    a, b, c = (Image.open(tmp_path / name / "0_0.png") for name in "abc")
    assert a.text["lora"] == " ".join(loras[1::2])
    assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert np.abs(np.asarray(a, int) - np.asarray(c, int)).mean() > 3


def change(tensors, kind):
    """A broken copy of an adapter's tensors."""
    tensors = dict(tensors)
    key = next(key for key in tensors if key.endswith("attn2.to_k.lora_A.weight"))
    up = key.replace("lora_A", "lora_B")
    if kind == "unknown layer":
        tensors[key.replace("to_k", "to_z")] = tensors[key]
    elif kind == "half":
        del tensors[up]
    elif kind == "rank":
        tensors[up] = tensors[up][:, :2]
    elif kind == "family":
        tensors[key] = np.zeros((3, 2048), np.float32)
    elif kind == "shape":
        tensors[up] = tensors[up][:5]
    elif kind in ("rank 0", "scalars"):
        down, above = ((0, 24), (16, 0)) if kind == "rank 0" else ((), ())
        tensors[key], tensors[up] = np.zeros(down, np.float32), np.zeros(above, np.float32)
    elif kind == "alpha":
        tensors[key.replace("lora_A.weight", "alpha")] = np.ones(3, np.float32)
    elif kind == "dora":
        tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = np.ones(4, np.float32)
    elif kind == "none":
        tensors = {}
    return tensors


BROKEN = {
    "unknown layer": r"1 of \d+ keys fit no layer of this model .*another model or family.*attn2\.to_z\.lora_A\.weight",
    "half": r"attn2\.to_k has no up weight",
    "rank": r"attn2\.to_k has a down weight of \[3, 24\] and an up weight of \[\d+, 2\]",
    "rank 0": r"attn2\.to_k has a down weight of \[0, 24\] and an up weight of \[16, 0\]",
    "scalars": r"attn2\.to_k has a down weight of \[\] and an up weight of \[\]",
    "alpha": r"attn2\.to_k has an alpha of \[3\], should be one number",
    "family": r"attn2\.to_k is adapted from \[2048\] .* but has \[24\].*Stable Diffusion XL",
    "shape": r"attn2\.to_k is adapted from \[24\] to 5 features, but has",
    "dora": r"attn2\.to_k: DoRA's lengths are \[4\], its weight",
    "none": "holds no adapter",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_does_not_fit_is_refused_by_name(base, folder, exported, tmp_path, capsys, kind):
    path = tmp_path / "broken.safetensors"
    write_safetensors(path, change(read_tensors(exported / adapters.FILE), kind))
    with pytest.raises(WeightsError, match=rf"broken\.safetensors: .*{BROKEN[kind]}"):
        adapters.read_adapter(path, base[0].networks)


def test_flags_that_cannot_work_are_one_line(folder, tmp_path, capsys):
    for text, message in {
        f"{tmp_path}/absent.safetensors": "absent.safetensors: no such adapter",
        f"{tmp_path}:strong": "the weight 'strong' should be a number",
        f"{tmp_path}": f"expected {adapters.FILE}, found no .safetensors file",
        f"{folder}/unet": "keys fit no layer",
    }.items():
        flags = ["--model", str(folder), "--prompt", PROMPT, "--out", str(tmp_path / "out"), "--lora", text]
        assert generate.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert (
        convert_scripts.load("merge_lora").main(
            [str(folder), str(folder / "unet"), str(tmp_path / "out"), "--weight", "nan"]
        )
        == 2
    )
    assert "--weight nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_continuing_needs_the_adapter_s_own_rank_and_layers(adapted, exported):
    pipeline, _, _ = adapted
    unet, layers = pipeline.networks["unet"], adapters.read_adapter(exported, pipeline.networks)["unet"]
    with pytest.raises(WeightsError, match=r"has rank 3, but config.lora has rank=4: .* set the adapter's rank"):
        adapters.low_rank_params(unet, layers, rank=4, alpha=2, what="it")
    name = next(iter(layers))
    rest = {key: value for key, value in layers.items() if key != name}
    with pytest.raises(mapping.CheckpointMismatch, match=rf"2 missing:\n    {re.escape(name)}\.lora_A\.weight"):
        adapters.low_rank_params(unet, rest, rank=3, alpha=2, what="it")


def test_an_sdxl_file_of_kohya_s_is_fused_as_in_diffusers(tmp_path):
    """Stability's block numbers and both text encoders: every weight within 1e-6 of what diffusers fuses."""
    pipeline, params = tiny_sdxl.make(tmp_path / "tokenizers")
    pipeline.save(tmp_path / "saved", params)
    tensors = adapter_files.kohya_of_sdxl(pipeline)
    write_safetensors(tmp_path / "sdxl.safetensors", tensors)
    read = adapters.read_adapter(tmp_path / "sdxl.safetensors", pipeline.networks)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    pipe.load_lora_weights(tmp_path / "sdxl.safetensors")
    assert_fused_alike(pipe, pipeline, params, read, 1.0)
