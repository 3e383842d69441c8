"""The web UI script on stand-ins of the web UI's modules: what is shown, what is saved, what is freed."""

import importlib.util
import re
import sys

import pytest
import webui_stand_in as webui
from PIL import Image
from score_server import serving

from imagereward_jax.integrations.__main__ import install
from imagereward_jax.rewards.functions import PythonReward

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # how the web UI reads the last line


@pytest.fixture
def opts():
    return webui.options()


@pytest.fixture
def module(opts, monkeypatch, tmp_path_factory):
    """The script, loaded from where the command puts it as the web UI does: its extension's folder on the path."""
    for name, stand_in in webui.make_modules(opts).items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    folder = tmp_path_factory.mktemp("webui")
    (folder / "extensions").mkdir()
    extension = install("webui", folder, python="/env/bin/python")
    monkeypatch.syspath_prepend(extension)
    for name in ("imagereward_client", "imagereward_prompts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("imagereward_script", extension / "scripts" / "imagereward_scores.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    yield script
    for name in ("imagereward_client", "imagereward_prompts"):
        sys.modules.pop(name, None)


@pytest.fixture
def request_of(opts, tmp_path):
    """Makes a request for four images."""

    def make(**changes):
        folders = {"outpath_samples": str(tmp_path / "samples"), "outpath_grids": str(tmp_path / "grids")}
        return webui.Processing(opts, **folders, **changes)

    return make


@pytest.fixture
def ready(module, tiny_reward):
    """The script, with a server of the tests' own scorer at its `url`."""
    with serving(tiny_reward, module.MODEL) as server:
        module.url = server.url
        yield module


def run(module, p, *, filter_low=False, limit=0.0, sort=True, reward=None):
    return module.Script().run(p, filter_low, limit, sort, reward or module.MODEL, module.url, "", "default")


def expected_scores(tiny_reward, prompt="a cat"):
    return {seed: tiny_reward.score(prompt, webui.make_image(seed)) for seed in range(100, 104)}


def score_in(text):
    return float(dict(PARAMETER.findall(text.split("\n")[-1]))["ImageReward score"])


def test_images_come_best_first_with_their_scores(ready, request_of, tiny_reward, opts):
    """Gallery, infotexts, prompts and seeds in the order of `score`'s scores, to the 4 digits that are written."""
    opts.return_grid = opts.grid_save = False
    processed = run(ready, request_of())
    scores = expected_scores(tiny_reward)
    assert processed.all_seeds == sorted(scores, key=lambda seed: -scores[seed])
    for image, text, seed, subseed in zip(
        processed.images, processed.infotexts, processed.all_seeds, processed.all_subseeds
    ):
        assert image.tobytes() == webui.make_image(seed).tobytes() and subseed == seed - 93
        assert score_in(text) == pytest.approx(scores[seed], abs=1e-4) and image.info["parameters"] == text
        assert f"Seed: {seed}," in text
    assert processed.info == processed.infotexts[0] and processed.seed == processed.all_seeds[0]
    unsorted = run(ready, request_of(), sort=False)
    assert unsorted.all_seeds == [100, 101, 102, 103]


def test_the_other_parameters_can_still_be_read(ready, request_of):
    """The web UI reads "key: value" pairs from the last line alone."""
    text = run(ready, request_of()).infotexts[-1]
    assert text.split("\n")[0] == "a cat" and len(text.split("\n")) == 3
    found = dict(PARAMETER.findall(text.split("\n")[-1]))
    assert found["Steps"] == "20" and found["Sampler"] == "Euler" and found["Size"].startswith("48x48")


def test_images_below_the_limit_are_neither_shown_nor_saved(ready, request_of, tiny_reward, tmp_path):
    """The limit is the second best score less a little: two stay, in the gallery, on disk and in the grid."""
    scores = sorted(expected_scores(tiny_reward).items(), key=lambda item: -item[1])
    processed = run(ready, request_of(), filter_low=True, limit=scores[1][1] - 1e-4)
    seeds = [seed for seed, _ in scores[:2]]
    assert processed.index_of_first_image == 1 and len(processed.images) == 3 and len(processed.infotexts) == 3
    assert processed.images[0].width == 2 * 48 and processed.all_seeds == seeds
    saved = sorted((tmp_path / "samples").iterdir())
    assert [int(path.stem.split("-")[1]) for path in saved] == seeds
    for path, (_, score) in zip(saved, scores):
        with Image.open(path) as image:
            assert score_in(image.info["parameters"]) == pytest.approx(score, abs=1e-4)
    assert len(list((tmp_path / "grids").iterdir())) == 1
    assert "2 of 4 images scored below" in processed.comments


def test_nothing_above_the_limit(ready, request_of, tmp_path):
    processed = run(ready, request_of(), filter_low=True, limit=1e6)
    assert processed.images == [] and "4 of 4 images scored below" in processed.comments
    assert processed.all_prompts and processed.infotexts, "the web UI shows the first of these"
    assert not (tmp_path / "samples").exists() and not (tmp_path / "grids").exists()


def test_settings_of_the_web_ui_are_followed(ready, request_of, opts, tmp_path):
    """Nothing is saved or shown as a grid where the user has switched it off, and the request is left as it was."""
    opts.samples_save = opts.grid_save = opts.enable_pnginfo = False
    p = request_of()
    processed = run(ready, p)
    assert not list(tmp_path.iterdir()) and processed.index_of_first_image == 1
    assert "parameters" not in processed.images[1].info
    assert (p.do_not_save_samples, p.do_not_save_grid) == (False, False)
    processed = run(ready, request_of(do_not_save_samples=True, do_not_save_grid=True))
    assert len(processed.images) == 4 and not list(tmp_path.iterdir())


def test_the_prompt_is_scored_as_a_person_would_say_it(ready, request_of, tiny_reward):
    processed = run(ready, request_of(prompt="a (red:1.3) cat BREAK [on] the ocean <lora:style:0.8>"))
    scores = expected_scores(tiny_reward, "a red cat, on the ocean")
    assert score_in(processed.infotexts[-1]) == pytest.approx(min(scores.values()), abs=1e-4)
    assert processed.all_prompts[0].endswith("<lora:style:0.8>"), "what the web UI shows is not touched"


def test_the_pass_that_draws_last_decides(module, request_of):
    """The second of hires. fix, with a prompt of its own; as many steps as image to image makes of an image."""
    p = request_of(prompt="a [cat:dog:0.9]", steps=10)
    assert module.final_prompts(p, [p.prompt] * 2) == ["a dog"] * 2
    p.enable_hr, p.hr_second_pass_steps = True, 5
    assert module.final_prompts(p, ["[cat:dog:1.5]", "[cat:dog:15]"]) == ["dog", "cat"]
    p.all_hr_prompts = ["an owl", "a fox", "a bird"]
    assert module.final_prompts(p, [p.prompt] * 2) == ["an owl", "a fox"]
    p = request_of(steps=10)
    p.init_images = [None]
    assert module.final_prompts(p, ["[cat:dog:0.75]", "[cat:dog:0.85]"]) == ["dog", "cat"]


def test_what_other_scripts_add_is_left_alone(ready, request_of, monkeypatch):
    """A map behind the images has no parameters: it is not scored, and comes last."""
    generate, extra = ready.process_images, Image.new("L", (8, 8))

    def with_a_map(p):
        processed = generate(p)
        processed.images.append(extra)
        return processed

    monkeypatch.setattr(ready, "process_images", with_a_map)
    processed = run(ready, request_of(), filter_low=True, limit=1e6)
    assert processed.images == [extra]
    processed = run(ready, request_of())
    assert len(processed.images) == 6 and processed.images[-1] is extra and len(processed.infotexts) == 5


def test_an_image_without_a_verdict_comes_last_and_is_never_above_a_limit(module, request_of):
    """The first of four images has none."""

    def odd(images, prompts):
        first = webui.make_image(100)
        return [float("nan") if image.tobytes() == first.tobytes() else float(image.mean()) for image in images]

    with serving(PythonReward(odd), module.MODEL) as server:
        module.url = server.url
        processed = run(module, request_of())
        assert processed.all_seeds[-1] == 100 and len(processed.all_seeds) == 4
        assert 100 not in run(module, request_of(), filter_low=True, limit=-1e6).all_seeds


def test_the_components_are_the_arguments_of_a_run(module, monkeypatch):
    """In this order, the Python as the command wrote it; the button stops the server."""
    made = []
    monkeypatch.setattr(module.gr, "Button", lambda **options: made.append(webui.Component(**options)) or made[-1])
    components = module.Script().ui(is_img2img=True)
    url = "http://127.0.0.1:8765"
    defaults = [False, 0.0, True, "ImageReward-v1.0", url, "/env/bin/python", "default"]
    assert [component.value for component in components] == defaults
    function, inputs, outputs = made[0].clicked
    assert function == module.server.stop and inputs == [] and len(outputs) == 1
    assert function() == "No server was started here."


@pytest.mark.parametrize(
    ("reward", "message"),
    [("PickScore", "serves ImageReward-v1.0, not PickScore"), ("", "no server at .*start one there")],
)
def test_what_cannot_score_is_named_before_anything_is_generated(ready, request_of, monkeypatch, reward, message):
    monkeypatch.setattr(ready, "process_images", None)
    if not reward:
        ready.url = "http://127.0.0.1:9"
    with pytest.raises(RuntimeError, match=message):
        run(ready, request_of(), reward=reward)


@pytest.mark.parametrize("limit", [None, float("nan")])
def test_a_limit_that_is_no_number_is_refused(module, request_of, limit):
    module.url = ""
    with pytest.raises(ValueError, match="the limit must be a number"):
        run(module, request_of(), filter_low=True, limit=limit)
