"""Every method on a Stable Diffusion 3 that PyTorch diffusers saved: full and adapters, with and without a cache."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import child
import jax
import numpy as np
import pytest
import tiny_sd3
from PIL import Image

for package in ("orbax.checkpoint", "grain", "ml_collections"):
    pytest.importorskip(package)
torch = pytest.importorskip("torch", reason="the reference is PyTorch diffusers")
diffusers = pytest.importorskip("diffusers", reason="the reference is PyTorch diffusers")
pytest.importorskip("peft", reason="diffusers loads adapters with it")

from imagereward_jax.assembly import trainable
from imagereward_jax.assembly.parts import Parts
from imagereward_jax.assembly.run import assemble
from imagereward_jax.config import ConfigError
from imagereward_jax.methods.base import HOST, Models
from imagereward_jax.models.param_tree import join
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.train import main
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.training.metric_writers import read_rows
from imagereward_jax.training.program import TrainingProgram
from imagereward_jax.weights.files import read_tensors

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS = ["a red circle", "a blue square", "a green cross"]
ENCODERS = {"text_encoder", "text_encoder_2", "text_encoder_3"}
TUNING = {"method.height": 8, "method.width": 8, "method.num_steps": 2, "method.sampler": "euler"}
METHODS = {
    "denoising": ("denoising", {}),
    "text encoders": ("denoising", {"method.train_text_encoder": True}),
    "dreambooth": ("dreambooth", {"method.instance_prompt": "a red cross", "method.class_prompt": "a cross"}),
    "refl": ("refl", {"method.stop_min": 0, "method.stop_max": 1, "method.pretrain": "alternate"} | TUNING),
    "draft": ("reward_gradient", {"method.guidance_scale": 3.0, "method.noisings": 1} | TUNING),
    "alignprop": ("reward_gradient", {"method.truncation": "per_step", "method.guidance_scale": 1.0} | TUNING),
    "drtune": ("reward_gradient", {"method.truncation": "spaced", "method.stop_min": 1} | TUNING),
    "flowbp": ("reward_gradient", {"method.truncation": "weighted"} | TUNING),
    "leap": ("reward_gradient", {"method.truncation": "leap"} | TUNING),
}
WARMTH = "import jax.numpy as jnp\n\ndef warmth(images, prompts):\n    return jnp.mean(images[..., 0], (1, 2))\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a model, pairs, prompts and a reward."""
    folder, rng = tmp_path_factory.mktemp("project"), np.random.default_rng(0)
    tiny_sd3.save_small(folder)
    (folder / "pairs").mkdir()
    for index, prompt in enumerate(PROMPTS):
        Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(folder / f"pairs/{index}.png")
        (folder / f"pairs/{index}.txt").write_text(prompt)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "sd3_reward.py").write_text(WARMTH)
    return folder


def config_of(name, **changes):
    method, own = METHODS[name]
    config = default_config(method)
    fields = {"batch_size": 2, "model.path": "model", "data.image_size": 8, "data.pairs": "pairs"}
    fields |= {"eval.prompts": "prompts.txt", "eval.best": "", "reward.path": "jax:sd3_reward:warmth"}
    fields |= {"data.prompts": "prompts.txt"} if "prompts" in config.data else {}
    config.update_from_flattened_dict(
        fields | own | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


@pytest.mark.parametrize(("name", "rank"), [("denoising", 0), ("refl", 0), *((name, 2) for name in METHODS)])
def test_a_step_of_every_method_is_traced(here, name, rank):
    """All weights of the transformer train but its position table, or adapters of it; T5 never does. With prompts from
    a cache no text encoder is held."""
    cache = "" if name == "text encoders" else "cache"
    config = config_of(name, lora__rank=rank, data__cache=cache)
    validate(config)
    run = assemble(config, one_device(), abstract=True)
    encoders = {"text_encoder", "text_encoder_2"} if name == "text encoders" else set()
    assert run.trainable.keys() == {"transformer"} | encoders
    assert ENCODERS & run.frozen.keys() == (ENCODERS if encoders else set())
    assert "position_table" in run.frozen["transformer"]["pos_embed"]
    state = TrainingProgram(config, run, one_device()).trace(run, "cpu").out_info[0]
    assert jax.tree.structure(state.params) == jax.tree.structure(run.trainable)


def test_batches_from_a_cache_are_those_without(here):
    """Conditions of pairs, prompts and a negative prompt: 1e-5, and only without a cache are there ids to encode."""
    found = {}
    for cache in ("", "cache"):
        config = config_of("refl", data__cache=cache, data__caption_dropout=0.0)
        parts = Parts(config, one_device())
        params = parts.base_pipeline.load_params()
        for source in (parts.pairs(), parts.prompts("a cross")):
            batch = {name: part for name, part in next(source.batches(None, None)).items() if name != HOST}
            assert any("ids" in name for name in batch) == (not cache)
            shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (batch, source.spec()))
            assert shapes[0] == shapes[1]
            prepared = jax.jit(source.prepare)(Models(params), batch)
            conditions = {name: prepared[name] for name in ("cond", "negative_cond") if name in prepared}
            found.setdefault(cache, []).append(conditions)
    assert found[""][1].keys() == {"cond", "negative_cond"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[""], found["cache"])


SMALL = ["model.path=model", "batch_size=2", "accumulation=1", "dtype=float32", "writers=('jsonl',)", "log_every=1"]
SMALL += [f"eval.{field}" for field in ("prompts=prompts.txt", "num_prompts=2", "num_steps=2", "batch_size=2")]
SMALL += ["optimizer.warmup_steps=0", "optimizer.learning_rate=0.01", "eval.images_per_prompt=1"]
TUNED = ["data.prompts=prompts.txt", "reward.path=jax:sd3_reward:warmth", "method.height=8", "method.width=8"]
TUNED += ["method.num_steps=3", "method.stop_min=1"]
DRTUNE = [*TUNED, "method.gradient_steps=2", "method.target=2.0"]
REFL = [*TUNED, "method.stop_max=2", "ema_decay=0.0"]


def command(recipe, workdir, *options):
    return ["train", f"--config={CONFIGS / recipe}.py", f"--workdir={workdir}", *(f"--config.{o}" for o in options)]


def test_drtune_from_a_cache_is_resumed_and_opens_in_diffusers(here):
    """The recipe by the command, one step and then another: every low-rank matrix has moved, but for one without effect
    (the last block's text is not used), and diffusers' transformer with the exported file predicts the velocity that
    ours does, within 1e-5."""
    recipe = command("drtune_sd35_lora", "drtune", *SMALL, *DRTUNE, "data.cache=cache", "ema_decay=0.0")
    for steps in (1, 2):
        assert main([*recipe, f"--config.steps={steps}"]) == 0
    rows = read_rows(Path("drtune/metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2] and "reward_gradient/reward" in rows[-1]
    tensors = read_tensors(Path("drtune/export/pytorch_lora_weights.safetensors"))
    assert all(key.startswith("transformer.") for key in tensors)
    still = [key for key, array in tensors.items() if not np.any(array)]
    assert still == ["transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"]

    from imagereward_jax.pipelines import open_pipeline
    from imagereward_jax.pipelines.adapted import load_params

    pipeline = open_pipeline("model")
    params, _ = load_params(pipeline, [("drtune/export", 1.0)], "float32")
    latents = np.random.default_rng(1).standard_normal((1, 8, 8, 16)).astype(np.float32)
    cond = pipeline.encode_prompts(params, pipeline.tokenize(["a red circle"]))
    ours = jax.jit(pipeline.denoise)(params, latents, np.float32([400.0]), cond)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained("model")
    embeds = cond["prompt_embeds"], cond["pooled_prompt_embeds"]
    inputs = [torch.tensor(np.array(x)) for x in (np.moveaxis(latents, -1, 1), *embeds, [400.0])]
    outputs = []
    for _ in range(2):
        with torch.no_grad():
            outputs.append(np.moveaxis(pipe.transformer(*inputs).sample.numpy(), 1, -1))
        pipe.load_lora_weights("drtune/export") if len(outputs) == 1 else None
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3
    np.testing.assert_allclose(ours, outputs[1], atol=1e-5 * np.abs(outputs[1]).max())


def test_adapters_of_the_text_encoders_open_in_diffusers(here):
    """Random adapters of both CLIPs, exported: diffusers encodes a prompt as ours do, within 1e-5; T5 has none."""
    parts = Parts(config_of("text encoders", lora__rank=2, lora__alpha=3.0), one_device())
    pipeline, params = parts.pipeline, parts.base_pipeline.load_params()
    assert list(pipeline.adapted) == ["transformer", "text_encoder", "text_encoder_2"]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), trainable.initial_adapter(parts)
    )
    adapted = join(params, drawn)
    Path("text").mkdir()
    export = trainable.export_adapter(parts)
    export.write({name: adapted[name] for name in export.components}, None, Path("text"))
    ours = [
        jax.jit(one.encode_prompts)(weights, one.tokenize(["a red circle"]))
        for one, weights in ((parts.base_pipeline, params), (pipeline, adapted))
    ]
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained("model")
    pipe.load_lora_weights("text")
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
    for name, expected in (("prompt_embeds", embeds.numpy()), ("pooled_prompt_embeds", pooled.numpy())):
        assert np.abs(ours[1][name] - ours[0][name]).max() > 1e-2
        np.testing.assert_allclose(ours[1][name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(
    "cache",
    [pytest.param("", id="decoded", marks=pytest.mark.slow), pytest.param("data.cache=several_cache", id="cached")],
)
def test_images_of_several_shapes_train_in_buckets_and_resume_bit_for_bit(here, cache):
    """Four steps, and two and two more: the same adapter; a program is compiled for every size that comes."""
    rng, wide = np.random.default_rng(0), Path("several")
    wide.mkdir(exist_ok=True)
    for index, (width, height) in enumerate([(8, 8), (9, 8), (16, 9), (20, 12)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(wide / f"{index}.png")
        (wide / f"{index}.txt").write_text(PROMPTS[index % 3])
    options = [*SMALL, "data.pairs=several", "data.image_size=8", "data.bucket_step=2", "lora.rank=2", "eval.prompts="]
    options += ["checkpoint.every=2", *([cache] if cache else [])]
    exported = []
    for name, ends in (("whole", [4]), ("resumed", [2, 4])):
        for steps in ends:
            recipe = command("sd35_lora", f"buckets_{name}_{bool(cache)}", *options, f"steps={steps}")
            assert main(recipe) == 0
        exported.append(read_tensors(Path(recipe[2].partition("=")[2]) / "export/pytorch_lora_weights.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, *exported)
    if cache:
        assert {path.name for path in Path("several_cache").iterdir()} == {"8x8", "10x6"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.bucket_step=3"], "image_size=8 should be a multiple of config.data.bucket_step=3"),
        (["data.bucket_step=1"], "bucket_step=1: .*should be a positive multiple of 2"),
        (["data.bucket_step=2", "data.pairs=shapes:train"], "bucket_step=2: the images of the shapes world are drawn"),
    ],
)
def test_buckets_that_cannot_be_are_refused(here, capsys, options, message):
    sized = ["data.pairs=pairs", "data.image_size=8", *options]
    assert main(command("sd35_lora", "refused", *SMALL, *sized, "steps=1")) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("drtune_sd35_lora", [*DRTUNE, "data.cache=cache"]),
        ("refl_sd35_lora", [*REFL, "data.cache=cache"]),
        ("sd35_lora", ["data.pairs=pairs", "data.image_size=8"]),
        ("dreambooth_sd35_lora", ["data.pairs=pairs", "data.image_size=8", "method.class_prompt='a cross'"]),
    ],
    ids=["drtune", "refl", "supervised", "dreambooth"],
)
def test_killed_and_resumed_ends_in_the_same_bits(here, recipe, options):
    """Killed before its third update, one step after a checkpoint: the adapter of a run that never stopped."""
    options = [*SMALL, *options, "steps=3", "checkpoint.every=1", "lora.rank=2", "method.num_class_images=3"]
    options = [one for one in options if "class_images" not in one or recipe.startswith("dreambooth")]
    script = [sys.executable, str(Path(__file__).parent / "killed_run.py")]
    environment = child.environment()
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])  # of the reward
    exported = []
    for name, moments in (("whole", [("never", "0")]), ("killed", [("batch", "3"), ("never", "0")])):
        for place, call in moments:
            arguments = command(recipe, f"{recipe}_{name}", *options)[1:]
            done = subprocess.run(
                [*script, place, call, "SIGKILL", *arguments], env=environment, capture_output=True, text=True
            )
            assert done.returncode == (0 if place == "never" else -signal.SIGKILL), done.stderr[-3000:]
        exported.append(read_tensors(Path(f"{recipe}_{name}/export/pytorch_lora_weights.safetensors")))
    jax.tree.map(np.testing.assert_array_equal, *exported)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(here):
    """Three steps of DRTune adapters, data 4 x fsdp 2: losses and rewards within 1e-5 relative."""
    options = [*SMALL, *DRTUNE, "steps=3", "batch_size=8", "eval.batch_size=8"]
    assert main(command("drtune_sd35_lora", "one", *options, "mesh.data=1")) == 0
    sharded = command("drtune_sd35_lora", "eight", *options, "mesh.data=4", "mesh.fsdp=2")
    done = subprocess.run(
        [sys.executable, "-m", "imagereward_jax.train", *sharded[1:]],
        env=child.environment(8), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight = (read_rows(Path(name) / "metrics.jsonl") for name in ("one", "eight"))
    assert len(one) == 4
    for a, b in zip(one[1:], eight[1:], strict=True):
        for name in ("reward_gradient/loss", "reward_gradient/reward"):
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=f"{name} at step {a['step']}")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("denoising", {"method__snr_gamma": 5.0}, r"snr_gamma=5.0: the model's schedule is a flow"),
        ("denoising", {"model__prediction_type": "epsilon"}, r"prediction_type='epsilon' is not supported"),
        ("draft", {"method__sampler": "ddim"}, r"ddim"),
        ("draft", {"lora__rank": 2, "lora__targets": "to_x"}, r"targets of the transformer.*'to_x' matches no layer"),
        ("draft", {"method__height": 11}, r"height=11 should be a positive multiple of 2"),
        ("text encoders", {"data__cache": "cache"}, r"config.data.cache holds encoded prompts"),
    ],
)
def test_settings_that_cannot_work_on_the_family_are_refused(here, name, changes, message):
    config = config_of(name, **changes)
    with pytest.raises((ConfigError, ValueError), match=message):
        validate(config)
        assemble(config, one_device(), abstract=True)
