"""report.html: it shows what the run left, whatever that is, and nothing in it runs or loads."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ml_collections")

from recorded_run import evaluation, record

from imagereward_jax.pages.figures import FULL, SIDE, Line, panel, ticks
from imagereward_jax.pages.page import SCRIPT
from imagereward_jax.pages.words import words
from imagereward_jax.training.html_report import write_report
from imagereward_jax.training.prompt_cards import BUDGET, ends_first
from imagereward_jax.training.prompt_cards import PROMPTS as SHOWN_PROMPTS
from imagereward_jax.training.record import read_run

PROMPTS = ["a cat", "a dog", "a fish"]
BEFORE, AFTER = [[1.0, 2.0], [1.0, 1.0], [3.0, 3.0]], [[1.0, 3.0], [2.0, 3.0], [2.0, 2.5]]
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def images(self):
        """[(alt, array)]."""
        found = [attrs for tag, attrs in self.tags if tag == "img"]
        return [(one["alt"], decoded(one["src"].partition("base64,")[2])) for one in found]


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def report(workdir, ending=""):
    write_report(workdir, ending)
    return Page(workdir / "report.html")


@pytest.fixture
def run(tmp_path):
    before, after = evaluation(PROMPTS, BEFORE), evaluation(PROMPTS, AFTER, seed=1)
    return record(tmp_path / "run", {0: before, 10: after}), before, after


def test_each_prompt_s_images_before_and_after_best_and_worst_first(run):
    """Gains are +0.5, +1.5 and -0.75; the images are the evaluations' own but for what WebP loses."""
    workdir, before, after = run
    page = report(workdir)
    headings = re.findall(r"<h4>(.*?)</h4>", page.source)
    assert headings == ["a dog", "a cat", "a fish"], "most gained first, then the lower half, the worst first"
    assert re.findall(r'gain"><span class="(\w+)">([-+.\d]+)<', page.source) == [
        ("up", "+1.5"),
        ("up", "+0.5"),
        ("down", "-0.75"),
    ]
    shown = page.images()
    assert [alt for alt, _ in shown] == ["a dog"] * 4 + ["a cat"] * 4 + ["a fish"] * 4
    rows = [2, 3, 0, 1, 4, 5]
    for found, at in zip(np.split(np.stack([image for _, image in shown]), 3), np.split(np.array(rows), 3)):
        expected = np.concatenate([before.samples.images[at], after.samples.images[at]])
        assert np.abs(found[:, 4::8, 4::8] - 255 * expected).mean() < 8  # of other noise 85


def test_prompts_and_names_of_others_stay_text(tmp_path):
    """One script, of the page's own hash; no attribute that runs; the prompt as it is."""
    found = {step: evaluation([HOSTILE, "\ud800"], [[1.0], [2.0 + step]]) for step in (0, 5, 10)}
    workdir = record(tmp_path / f"{HOSTILE[:2]}run", found, [(10, {f"{HOSTILE}/loss": 1.0})])
    (workdir / "started.json").write_text(json.dumps({"command": HOSTILE}))
    line = json.dumps({"prompt": "x", "scores": {HOSTILE: [1]}, "images": [HOSTILE]})
    for step in (0, 5, 10):
        with (workdir / f"samples/step_{step:07d}.jsonl").open("a") as file:
            file.write(line + "\n")
    page = report(workdir, ending=HOSTILE)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in page.tags if tag == "img")
    assert page.text.count(HOSTILE) >= 3
    (policy,) = (attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    script = re.search(r"<script>(.*?)</script>", page.source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == SCRIPT and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_run_that_goes_on_was_resumed_or_has_no_verdict(tmp_path):
    """NaN is a gap and no number; a pause costs no training time; samples past the last row are a killed run's."""
    rows = [
        (2, {"refl/loss": 1.0, "images": 8.0, "images_per_second": 4.0}),
        (3, {"refl/loss": np.nan, "images": 12.0, "images_per_second": 1.0}),
        (4, {"refl/loss": 3.0, "images": 16.0, "images_per_second": 2.0}),
    ]
    found = {0: evaluation(PROMPTS, np.full((3, 1), np.nan)), 4: evaluation(PROMPTS, [[1.0], [np.nan], [2.0]])}
    workdir = record(tmp_path / "run", found, rows)
    (workdir / "samples/step_0000008.jsonl").write_text((workdir / "samples/step_0000004.jsonl").read_text())
    with (workdir / "samples/step_0000004.jsonl").open("a") as file:
        file.write('{"prompt": "a cut li')
    page = report(workdir)
    assert "step 4 of 10, not complete" in page.text and "step 8" not in page.text
    assert "nan" not in re.sub("data:image[^>]*", "", page.source).lower()
    assert page.text.count("no verdict") > 3
    cost = read_run(workdir).cost()
    assert (cost.images, cost.evaluated, cost.seconds) == (16, 6, 8 / 4 + 4 / 1 + 4 / 2)
    assert "16 images trained on" not in page.text and ">16<" in page.source
    curve = page.source.partition(">refl/loss</code>")[2].partition("</svg>")[0]
    assert re.search(r'class="line k0" d="M[\d. ]+M[\d. ]+"', curve), "two pieces, with a gap between"


def test_a_run_without_evaluation_without_images_and_without_numbers(tmp_path):
    rows = [(1, {"refl/loss": 1.0}), (2, {"refl/loss": 2.0})]
    page = report(record(tmp_path / "begun", {}, rows))
    assert "No evaluation yet." in page.text and "refl/loss" in page.text and not page.images()
    found = {0: evaluation(PROMPTS, BEFORE), 10: evaluation(PROMPTS, AFTER), 20: evaluation(PROMPTS, AFTER)}
    silent = record(tmp_path / "silent", found, writers=("log",))
    (silent / "metrics.jsonl").unlink()
    page = report(silent)
    assert "config.writers has no 'jsonl'" in page.text and len(page.images()) == 18
    page = report(record(tmp_path / "blind", {}, [(step, {"eval/reward_mean": 1.0 + step}) for step in (0, 5, 10)]))
    assert "The reward, and what watches it" in page.text and not page.images() and 'id="slider"' not in page.source
    page = report(record(tmp_path / "first", {0: evaluation(PROMPTS, BEFORE)}))
    assert len(page.images()) == 6 and "before and after" not in page.text


def test_older_runs_show_their_contact_sheets(tmp_path):
    workdir = record(tmp_path / "run", {}, [(step, {"eval/reward_mean": 1.0 + step}) for step in (0, 5, 10)])
    (workdir / "started.json").unlink()
    (workdir / "samples").mkdir()
    for step in (0, 5, 10, 99):
        Image.new("RGB", (80, 40), (step, 0, 0)).save(workdir / f"samples/step_{step:07d}.png")
    page = report(workdir)
    assert [image.shape for _, image in page.images()] == [(40, 80, 3)] * 3 and 'id="slider"' in page.source


def test_curves_are_grouped_and_told_in_words(tmp_path):
    rows = [
        (
            step,
            {"refl/loss": step, "refl/stop": step, "refl/grad_norm": float(step % 3), "skipped": 0.0, "mine/odd": step},
        )
        for step in range(1, 6)
    ]
    page = report(record(tmp_path / "run", {}, rows))
    assert re.search(r"Never changed: Skipped updates skipped: 0\.", page.text)
    assert "The same numbers as refl/stop." in page.text and page.source.count('role="img"') == 3
    assert "Training: refl" in page.text and "arXiv 2304.05977" in page.text and "Training: mine" in page.text
    assert words("refl/stop").title == "Stopping step" and words("eval/checker_rate@5").title.endswith("at guidance 5")
    assert words("eval/judge_pick").title == "Judge: pick" and words("mine/odd") == ("odd", "")


def test_the_band_is_the_standard_deviation_over_prompts(run):
    deviations, extremes = read_run(run[0]).spread("eval/reward_mean")
    for step, rewards in ((0, BEFORE), (10, AFTER)):
        means = np.mean(rewards, axis=1)
        assert deviations[step] == pytest.approx(np.std(means), rel=1e-6)
        assert extremes[step] == (means.min(), means.max())


def test_other_prompts_on_resume_are_paired_by_their_text(tmp_path):
    found = {0: evaluation(PROMPTS, BEFORE), 10: evaluation(["a fish", "a cow", "a cat"], AFTER)}
    page = report(record(tmp_path / "run", found))
    assert re.findall(r"<h4>(.*?)</h4>", page.source) == ["a cat", "a fish"]
    assert re.findall(r'gain"><span class="\w+">([-+.\d]+)<', page.source) == ["+0.75", "-1"]
    found[10] = evaluation(["a cow"], [[1.0]])
    assert "have no prompt in common" in report(record(tmp_path / "others", found)).text


def test_the_halves_begin_with_their_ends_and_a_prompt_may_come_twice(tmp_path):
    prompts = ["a cat", "a dog", "a cat", "a cow", "a fish"]
    found = {0: evaluation(prompts, np.zeros((5, 1))), 10: evaluation(prompts, [[1.0], [3.0], [5.0], [-2.0], [-1.0]])}
    page = report(record(tmp_path / "run", found))
    shown = re.findall(r'<h4>(.*?)</h4><p class="gain"><span class="\w+">([-+\d]+)<', page.source)
    assert shown == [("a cat", "+5"), ("a dog", "+3"), ("a cat", "+1"), ("a cow", "-2"), ("a fish", "-1")]


def test_a_long_run_s_page_stays_small(tmp_path):
    """Noise of 128 pixels at 12 evaluations: the budget and little else, with room for PROMPTS; ends are kept."""
    prompts = [f"prompt {index}" for index in range(8)]
    found = {step: evaluation(prompts, [[step + index] for index in range(8)], size=128) for step in range(12)}
    rows = [(step, {"refl/loss": float(np.sin(step))}) for step in range(5000)]
    page = report(record(tmp_path / "run", found, rows, steps=5000))
    assert len(page.source) < BUDGET + 60_000 and len({alt for alt, _ in page.images()}) == SHOWN_PROMPTS
    steps = re.findall(r"<span data-at=[^>]*>step (\d+)", page.source)
    assert 2 < len(steps) < 11 and steps[-1] == "11" and "step 0: 0" in page.text
    curve = re.search(r'refl/loss</code>.*?class="line k0" d="(.*?)"', page.source)[1]
    assert len(re.findall("[ML]", curve)) <= FULL


def test_figures_draw_what_they_are_given():
    """Positions are linear in step and value, higher values are higher; axes are labelled where their ticks are."""
    points = [(0, 1.0), (5, 2.0), (10, 1.5), (20, 3.0)]
    source = panel("Loss", "loss", "", [Line(points)], (0, 20))
    drawn = np.array(
        [[float(x) for x in pair.split()] for pair in re.findall(r"[ML]([\d.]+ [\d.]+)(?=[ML\"])", source)]
    )
    drawn = drawn[-4:]
    np.testing.assert_allclose(drawn[:, 0], [SIDE * step / 20 for step, _ in points], atol=0.1)
    slope, offset = np.polyfit([value for _, value in points], drawn[:, 1], 1)
    np.testing.assert_allclose(drawn[:, 1], [slope * value + offset for _, value in points], atol=0.2)
    assert slope < 0 and 0 < drawn[:, 1].min() < drawn[:, 1].max() < SIDE
    for top, label in re.findall(r'class="y" style="top:([\d.]+)%">([^<]+)<', source):
        assert float(top) * 10 == pytest.approx(slope * float(label) + offset, abs=1)
    assert 'aria-label="Loss over steps: 1 → 3"' in source


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (1e-7, 3e-7), (0.77, 0.87), (-5, -4.99), (0, 1e9)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 5 and low <= found[0] + 1e-12 and found[-1] <= high + 1e-9 * abs(high)
    spacing = found[1] - found[0]
    np.testing.assert_allclose(np.diff(found), spacing, rtol=1e-6)
    assert f"{spacing:.3e}"[0] in "125"
    assert ticks(3, 3, 4) == [3] and ticks(0, 3, 4, whole=True) == [0, 1, 2, 3]


def test_both_ends_come_first():
    values = {key: value for key, value in zip("abcde", (1, 5, None, 3, 2))}
    assert ends_first("abcde", values.get) == ["b", "a", "d", "e", "c"]
