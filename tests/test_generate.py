"""The generate command, end to end on a tiny random model."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_sd1
from PIL import Image

from imagereward_jax.generate import main
from imagereward_jax.models import lora
from imagereward_jax.pipelines import load_pipeline, open_pipeline
from imagereward_jax.weights import adapters, orbax
from imagereward_jax.weights.generation import Generation, write_generation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pipeline, params = tiny_sd1.make(tmp_path_factory.mktemp("tokenizer"))
    path = tmp_path_factory.mktemp("saved") / "tiny"
    pipeline.save(path, params)
    return path


def run(folder, out, *flags, prompt=("--prompt", "a red circle")):
    return main(["--model", str(folder), "--out", str(out), "--steps", "3", *prompt, *flags])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_do_not_depend_on_the_batch(folder, tmp_path, capsys):
    """Three pictures of two prompts in batches of 4 and of 1: files, sheet, settings, and the same pixels (+-1)."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": "x-1", "prompt": "a red circle"}, {"id": "x-2", "prompt": "a blue square"}]))
    source = ("--prompts", str(prompts))
    flags = ("--num-images", "3", "--sampler", "ddim", "--eta", "1", "--seed", "5")
    assert run(folder, tmp_path / "a", *flags, "--grid", prompt=source) == 0
    assert "6 images in" in capsys.readouterr().out
    names = [f"x-{i}_{k}.png" for i in (1, 2) for k in range(3)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["grid.png", *names]
    assert run(folder, tmp_path / "b", *flags, "--batch-size", "1", prompt=source) == 0
    pictures = [pixels(tmp_path / "a" / name) for name in names]
    for name, picture in zip(names, pictures):
        assert np.abs(picture - pixels(tmp_path / "b" / name)).max() <= 1
        assert picture.shape == (16, 16, 3)
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 3 for other in pictures[:i]), "pictures should differ"

    text = Image.open(tmp_path / "a" / "x-2_1.png").text
    assert text["prompt"] == "a blue square"
    assert (text["seed"], text["sampler"], text["steps"], text["eta"]) == ("6", "ddim", "3", "1.0")
    alone = ("--sampler", "ddim", "--eta", "1", "--seed", text["seed"])
    assert run(folder, tmp_path / "c", *alone, prompt=("--prompt", text["prompt"])) == 0
    assert np.abs(pixels(tmp_path / "c" / "0_0.png") - pictures[4]).max() <= 1


def test_a_second_run_asks_before_it_writes(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--guidance-scale", "1") == 0
    first = (out / "0_0.png").read_bytes()
    assert run(folder, out, "--guidance-scale", "1", "--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "0_0.png").read_bytes() == first
    assert run(folder, out, "--guidance-scale", "1", "--overwrite") == 0
    assert (out / "0_0.png").read_bytes() == first, "the same command makes the same file"


def test_noise_from_a_file(folder, tmp_path, capsys):
    """The picture is that of diffusers from the same noise, but for rounding to 8 bits."""
    diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
    import torch

    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    flags = ("--noise", str(tmp_path / "noise.npy"), "--sampler", "dpmpp_2m", "--negative-prompt", "green")
    assert run(folder, tmp_path / "out", *flags) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    latents = torch.tensor(np.moveaxis(noise, -1, 1).copy())
    image = pipe("a red circle", negative_prompt="green", latents=latents, num_inference_steps=3).images[0]
    assert np.abs(pixels(tmp_path / "out" / "0_0.png") - np.asarray(image).astype(int)).max() <= 1
    capsys.readouterr()
    assert run(folder, tmp_path / "two", *flags, "--num-images", "2") == 2
    assert "[2, 8, 8, 4]" in capsys.readouterr().err


def test_bfloat16_and_what_is_cut_off(folder, tmp_path, capsys):
    """bfloat16 makes the same picture to within 3 % on average; the end of a long prompt is named."""
    prompt = ("--prompt", "red " * 14 + "square")
    assert run(folder, tmp_path / "a", "--guidance-scale", "1", prompt=prompt) == 0
    assert "left out: 'square'" in capsys.readouterr().err
    assert run(folder, tmp_path / "b", "--guidance-scale", "1", "--dtype", "bfloat16", prompt=prompt) == 0
    assert np.abs(pixels(tmp_path / "a" / "0_0.png") - pixels(tmp_path / "b" / "0_0.png")).mean() < 0.03 * 255


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "dimm"], "did you mean 'ddim'"),
        (["--width", "15"], "width=15"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "2000"], "num_steps=2000"),
        (["--eta", "2"], "--eta 2.0"),
        (["--num-images", "0"], "--num-images 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--guidance-scale", "nan"], "--guidance-scale nan"),
        (["--guidance-scale", "1", "--negative-prompt", "green"], "--negative-prompt"),
        (["--prompt", " "], "--prompt number 2 is empty"),
        (["--noise", "absent.npy"], "absent.npy"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--variant", "fp16"], "fp16"),
        (["--lora-scale", "0.5"], "--lora-scale has no effect without --lora"),
        (["--lora", "adapter", "--lora-scale", "nan"], "--lora-scale nan"),
        (["--tuned-steps", "0.2:1"], "pass --base MODEL, or --lora"),
        (["--base", "MODEL"], "--base has no effect without --tuned-steps"),
        (["--base", "MODEL", "--tuned-steps", "0.2"], "--tuned-steps '0.2' should be two positions"),
        (["--base", "MODEL", "--tuned-steps", "0.6:0.2"], "tuned steps 0.6:0.2 should be two positions from 0 to 1"),
        (["--base", "MODEL", "--tuned-steps", "0.4:0.6"], "tuned steps 0.4:0.6 hold none of 3 steps"),
        (["--base", "MODEL", "--tuned-weight", "0:1:2:3"], "--tuned-weight '0:1:2:3' should be a number"),
        (["--base", "MODEL", "--tuned-weight", "inf"], "--tuned-weight 'inf' should be a number"),
        (["--base", "MODEL", "--base-negative", "--guidance-scale", "1"], "--base-negative has no effect with"),
        (["--base", "no/such/base", "--tuned-weight", "0.5"], "no/such/base"),
        (["--base", "tiny-shapes", "--tuned-weight", "0.5"], "--base tiny-shapes has another unet than the tuned"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, flags, message):
    assert run(folder, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('[{"prompt": "a cat"}, {"prompt": " "}]', "row 2"),
        ('[{"id": "a/b", "prompt": "a cat"}]', "id: 'a/b' should be a name of a file or folder, not a path"),
        ('[{"id": 1, "prompt": "a cat"}, {"id": 1, "prompt": "a dog"}]', "row 2"),
    ],
)
def test_bad_files_of_prompts(folder, tmp_path, capsys, content, message):
    path = tmp_path / ("prompts.json" if content.startswith("[") else "prompts.txt")
    path.write_text(content)
    assert run(folder, tmp_path / "out", prompt=("--prompts", str(path))) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_broken_weights_are_not_saved(folder, tmp_path, capsys):
    pipeline, params = load_pipeline(folder)
    params["unet"]["conv_out"]["bias"] = np.full(4, np.nan, np.float32)
    pipeline.save(tmp_path / "broken", params)
    assert run(tmp_path / "broken", tmp_path / "out", "--guidance-scale", "1") == 2
    assert "unet: conv_out.bias has values that are NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_defaults_are_the_models_then_the_adapters(folder, tmp_path, capsys):
    """The model's generation_config.json, that of the last --lora's folder, and flags over both; told in the PNG."""
    model = shutil.copytree(folder, tmp_path / "model")
    write_generation(model, Generation("euler", 2, 1.0))
    prompt = ["--model", str(model), "--prompt", "a red circle"]

    def stated(out, *flags):
        assert main([*prompt, "--out", str(tmp_path / out), *flags]) == 0
        text = Image.open(tmp_path / out / "0_0.png").text
        return text["sampler"], int(text["steps"]), float(text["guidance_scale"])

    assert stated("a") == ("euler", 2, 1.0)
    assert "euler, 2 steps, guidance scale 1" in capsys.readouterr().out
    pipeline, _ = load_pipeline(folder)
    adapted = pipeline.with_lora("unet", pipeline.lora_targets, rank=1, alpha=1.0)
    own = {"unet": lora.init(adapted.networks["unet"], jax.random.key(0))}
    options = {"rank": 1, "alpha": 1.0, "generation": Generation("ddim", 3, 1.0)}
    adapters.write_adapter(tmp_path, adapted.networks, own, **options)
    assert stated("b", "--lora", str(tmp_path)) == ("ddim", 3, 1.0)
    assert stated("c", "--lora", str(tmp_path), "--steps", "1") == ("ddim", 1, 1.0)
    assert main([*prompt, "--out", str(tmp_path / "d"), "--negative-prompt", "green"]) == 2
    assert "--negative-prompt has no effect" in capsys.readouterr().err


def test_an_orbax_folder_is_a_model(folder, tmp_path):
    """What convert/from_diffusers.py wrote makes the very same image, and exports the same weights."""
    pytest.importorskip("orbax.checkpoint")
    pipeline, params = load_pipeline(folder)
    networks = [
        (name, pipeline.component_config(name), jax.tree.map(jax.numpy.asarray, params[name])) for name in params
    ]
    orbax.save_pipeline_checkpoint(
        tmp_path / "orbax",
        networks,
        pipeline_class=pipeline.pipeline_class,
        scheduler_config=pipeline.scheduler_config,
        tokenizers=pipeline.tokenizer_folders,
        generation=Generation("ddim", 3, 1.0),
    )
    assert run(folder, tmp_path / "a", "--guidance-scale", "1") == 0
    assert main(["--model", str(tmp_path / "orbax"), "--prompt", "a red circle", "--out", str(tmp_path / "b")]) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a" / "0_0.png"), pixels(tmp_path / "b" / "0_0.png"))
    opened = open_pipeline(tmp_path / "orbax")
    assert opened.family == "sd1" and opened.generation == Generation("ddim", 3, 1.0)
    opened.save(tmp_path / "back", {"vae": params["vae"]})
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(tmp_path / "back")[1], params)
