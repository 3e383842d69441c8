"""The demo: what it shows of a name, that its images are those of `generate`, and its page in a real browser."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_sd1
from PIL import Image

from imagereward_jax import generate
from imagereward_jax.demo import enlarged, main, scorer
from imagereward_jax.models import lora
from imagereward_jax.side_by_side import Shown, SideBySide, captions, check_request, default_rewards, find_shown, gains
from imagereward_jax.weights import adapters, hub
from imagereward_jax.weights.generation import Generation

ROOT = Path(__file__).parents[1]
BROWSER = os.environ.get("IMAGEREWARD_JAX_BROWSER")  # a folder with npm's puppeteer-core and @sparticuz/chromium
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that exported an adapter, whose base is in the folder beside it."""
    folder = tmp_path_factory.mktemp("demo")
    pipeline, params = tiny_sd1.make(folder / "tokenizer")
    pipeline.save(folder / "base", params)
    adapted = pipeline.with_lora("unet", pipeline.lora_targets, rank=2, alpha=2.0)
    own = lora.init(adapted.networks["unet"], jax.random.key(0))
    own = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), own)
    export = folder / "run" / "export"
    export.mkdir(parents=True)
    options = {"rank": 2, "alpha": 2.0, "generation": Generation("ddim", 3, 4.0)}
    adapters.write_adapter(export, adapted.networks, {"unet": own}, **options)
    (folder / "run/metrics.jsonl").touch()
    terms = {"one": {"path": "tiny-shapes"}}
    config = {"model": {"path": str(folder / "base")}, "reward": {"path": "", "terms": terms}}
    (folder / "run/config.json").write_text(json.dumps(config))
    return folder / "run"


@pytest.fixture(scope="module")
def models(run, tiny_reward_folder):
    return SideBySide(find_shown(str(run)), [str(tiny_reward_folder), "jpeg-compressibility"])


def test_a_run_an_export_an_adapter_and_a_model_are_told_apart(run, tmp_path):
    base, export = str(run.parent / "base"), str(run / "export")
    assert find_shown(str(run)) == find_shown(export) == Shown(base, adapter=export, rewards=("tiny-shapes",))
    assert find_shown(str(run), "other").model == "other"
    assert find_shown("tiny-shapes") == Shown("tiny-shapes")
    assert find_shown(base, "tiny-shapes") == Shown(base, base="tiny-shapes")
    (tmp_path / "run/export").mkdir(parents=True)
    for name in ("metrics.jsonl", "export/model_index.json"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "run/config.json").write_text('{"model": {"path": "tiny-shapes"}, "reward": {"path": "PickScore"}}')
    tuned = find_shown(str(tmp_path / "run"))
    assert tuned == Shown(str(tmp_path / "run/export"), base="tiny-shapes", rewards=("PickScore",))
    assert default_rewards(tuned) == ["PickScore", "jpeg-compressibility"]
    for name in hub.builtin_models():
        assert default_rewards(Shown(name))[0] == "tiny-shapes"
    assert default_rewards(Shown("owner/model"))[0] == "ImageReward-v1.0"


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        (lambda folder: (folder / "metrics.jsonl").touch(), [], r"has no export yet: .*`imagereward export"),
        (lambda folder: (folder / adapters.FILE).touch(), [], "is an adapter: pass --base"),
        (lambda folder: (folder / "other.txt").touch(), [], "model_index.json"),
    ],
)
def test_what_cannot_be_shown_is_one_line(make, argv, message, tmp_path, capsys):
    make(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", sys)  # which it gets to only if the models open
        assert main([str(tmp_path), *argv]) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


GOOD = {
    "prompt": PROMPT,
    "negative_prompt": None,
    "steps": 3,
    "guidance_scale": 2.5,
    "seed": 0.0,
    "count": 2,
    "lora_scale": 1,
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", "  ", "prompt is empty"),
        ("prompt", None, "prompt is empty"),
        ("prompt", "a" * 2001, "2,001 characters"),
        ("negative_prompt", "\ud800", "negative prompt holds half a character"),
        ("steps", 10**9, "steps: expected a whole number from 1 to 150, not 1000000000"),
        ("steps", 2.5, "steps: expected a whole number"),
        ("count", "2", "count: expected a whole number from 1 to 8, not '2'"),
        ("seed", -1, "seed: expected a whole number from 0 to 2,147,483,647"),
        ("guidance_scale", float("nan"), "guidance scale: expected a number from 0.0 to 30.0, not nan"),
        ("lora_scale", None, "lora scale: expected a number"),
    ],
)
def test_what_a_page_sends_is_checked(field, value, message):
    """A visitor can send more than the sliders allow."""
    request = check_request(**GOOD)
    assert (request.seed, request.negative_prompt, request.lora_scale) == (0, "", 1.0)
    with pytest.raises(ValueError, match=message):
        check_request(**{**GOOD, field: value})


def test_images_are_those_of_generate_and_scores_those_of_the_reward(run, models, tiny_reward, tmp_path):
    """Pixels within one level of 255; at a LoRA scale of 0 the tuned model is its base to the bit."""
    assert models.compares and models.generation.num_inference_steps == 3
    request = check_request(**{**GOOD, "seed": 5})
    images = models.draw(request)
    flags = ["--steps", "3", "--guidance-scale", "2.5", "--seed", "5", "--num-images", "2", "--sampler", "ddim"]
    command = ["--model", str(run.parent / "base"), "--prompt", PROMPT, *flags]
    for name, more in {"base": [], "tuned": ["--lora", str(run / "export")]}.items():
        assert generate.main([*command, "--out", str(tmp_path / name), *more]) == 0
        for k, image in enumerate(images[name]):
            made = np.asarray(Image.open(tmp_path / name / f"0_{k}.png")).astype(int)
            assert np.abs(image.astype(int) - made).max() <= 1
    assert np.abs(images["base"].astype(int) - images["tuned"]).mean() > 1
    unchanged = models.draw(request._replace(lora_scale=0.0))
    np.testing.assert_array_equal(unchanged["tuned"], unchanged["base"])
    np.testing.assert_array_equal(unchanged["base"], images["base"])
    scores = models.score(PROMPT, list(images["tuned"]))
    expected = tiny_reward.score(PROMPT, list(images["tuned"]))
    np.testing.assert_allclose(next(iter(scores.values())), expected, atol=1e-5)
    assert list(scores)[1] == "jpeg-compressibility"


def test_uploads_are_ranked_and_bad_ones_named(models, tmp_path):
    paths = []
    for k, color in enumerate(("red", "blue", "white")):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.new("RGB", (40, 32), color).save(paths[-1])
    score = scorer(models)
    (ranked,) = [score(PROMPT, paths)]
    first = next(iter(models.score(PROMPT, paths).values()))
    names = [caption.partition(":")[0] for _, caption in ranked]
    assert names == [f"{k}.png" for k in np.argsort(first)[::-1]]
    (tmp_path / "bad.png").write_text("broken")
    for inputs, message in (
        ((PROMPT, None), "There is no image"),
        (("", paths), "prompt is empty"),
        ((PROMPT, paths * 6), "18 images: at most 16"),
        ((PROMPT, [*paths, str(tmp_path / "bad.png")]), r"^bad.png: not a readable image"),
    ):
        with pytest.raises(ValueError, match=message):
            score(*inputs)


def test_numbers_and_small_images_are_made_for_people():
    base, tuned = {"a": [1.0, 2.0], "b": [0.0, 0.0]}, {"a": [2.0, 2.0], "b": [-1.0, 0.0]}
    assert gains(base, tuned) == [["a", 1.5, 2.0, "+0.500"], ["b", 0.0, -0.5, "-0.500"]]
    assert captions(tuned) == ["2.00 · -1.00", "2.00 · 0.00"]
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert enlarged(small).shape == (256, 256, 3) and enlarged(np.zeros((512, 512, 3), np.uint8)).shape[0] == 512
    np.testing.assert_array_equal(enlarged(small)[::128, ::128], small)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="IMAGEREWARD_JAX_BROWSER names no folder with puppeteer-core")
def test_a_visitor_sees_images_scores_and_errors(tmp_path):
    """In a headless Chromium, with nothing asked of any other host, and no wider than a phone."""
    pytest.importorskip("gradio")
    image, broken = tmp_path / "image.png", tmp_path / "brok.png"
    Image.new("RGB", (64, 64), "red").save(image)
    broken.write_text("broken")
    command = [sys.executable, "-m", "imagereward_jax.demo", str(hub.ASSETS / "tiny-shapes"), "--base", "tiny-shapes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            script = ["node", str(ROOT / "tests/demo_page.mjs"), url, *map(str, (tmp_path, image, broken))]
            seen = json.loads(subprocess.run(script, cwd=BROWSER, capture_output=True, check=True, timeout=900).stdout)
        finally:
            process.kill()
    assert not [one for one in seen["requests"] if not one.startswith((url, "data:", "blob:"))] and not seen["errors"]
    assert seen["images"]["base"] >= 2 and seen["images"]["tuned"] >= 2
    assert all(re.fullmatch(r"-?\d+\.\d\d · -?\d+\.\d\d", caption) for caption in seen["captions"])
    assert {"jpeg-compressibility", "+0.000"} <= set(seen["table"]), "they are the same model"
    assert "The prompt is empty." in seen["empty"] and "There is no image" in seen["nothing"]
    assert seen["ranked"][0].startswith("image.png: ") and "brok.png" in seen["broken"]
    assert seen["width"] <= 390
