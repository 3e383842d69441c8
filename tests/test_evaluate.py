"""The evaluate command on the original repository's two layouts and on the shapes world."""

import html.parser
import json
import re

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from imagereward_jax import evaluate


def smooth(rng, side=40):
    coarse = Image.fromarray((rng.random((3, 3, 3)) * 255).astype(np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    """A test.json with ties, an unranked image and a prompt of one image, and its folder."""
    folder = tmp_path_factory.mktemp("rankings")
    rng = np.random.default_rng(0)
    rows = []
    for i, ranking in enumerate(([1, 2, 5, 3], [2, 2, 1], [1, None, 2], [1])):
        names = [f"part-0/{i}/{k}.png" for k in range(len(ranking))]
        for name in names:
            (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            smooth(rng).save(folder / "images" / name)
        rows.append({"id": f"00-{i}", "prompt": f"a red cat, number {i} <b>", "generations": names, "ranking": ranking})
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """Prompts with ids, and images DIR/MODEL/ID_K.png of three generators."""
    folder = tmp_path_factory.mktemp("generations")
    rng = np.random.default_rng(1)
    prompts = [{"id": f"000{i}", "prompt": f"a dog on the {i}"} for i in range(3)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for model in ("alpha", "beta", "gamma"):
        (folder / "images" / model).mkdir(parents=True)
        for row in prompts:
            for k in range(2):
                smooth(rng).save(folder / "images" / model / f"{row['id']}_{k}.png")
    return folder


@pytest.fixture
def loaded(tiny_reward, monkeypatch):
    """Lets the command use the tests' own scorer, which is compiled already."""
    monkeypatch.setattr("imagereward_jax.bulk_scoring.scorers.open_scorer", lambda *_, **__: tiny_reward)


def printed(capsys, *arguments):
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_rankings_beside_the_models_own_scores(rankings, tiny_reward, tiny_reward_folder, capsys):
    """Scores within 1e-5 of `score`, one prompt at a time; right pairs counted from those by loops."""
    arguments = ["--data", rankings / "test.json", "--images", rankings / "images", "--batch-size", 4, "--json"]
    report = json.loads(printed(capsys, "--model", tiny_reward_folder, "--model", "random", *arguments))
    right = pairs = 0
    for row, found in zip(json.loads((rankings / "test.json").read_text()), report["prompts"]):
        scores = tiny_reward.score(row["prompt"], [rankings / "images" / name for name in row["generations"]])
        np.testing.assert_allclose(found["scores"]["tiny"], scores, atol=1e-5)
        ranks = row["ranking"]
        for a in range(len(ranks)):
            for b in range(len(ranks)):
                if None not in (ranks[a], ranks[b]) and ranks[a] < ranks[b]:
                    pairs += 1
                    right += scores[a] > scores[b]
    accuracy = report["models"]["tiny"]["accuracy"]
    assert (accuracy["cases"], accuracy["value"]) == (pairs, right / pairs) and pairs == 6 + 2 + 1
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert (
        report["models"]["random"]["recall@2"]["cases"] == 2 and report["models"]["random"]["recall@4"]["value"] is None
    )


def test_rankings_of_other_data_sets(tmp_path, loaded, capsys):
    """HPDv2's test.json and Pick-a-Pic as Parquet: scores of the same images in ImageReward's form, and a page."""
    rng = np.random.default_rng(3)
    names = [f"{k}.png" for k in range(6)]
    for name in names:
        smooth(rng).save(tmp_path / name)
    groups = [(names[:3], [3, 1, 2]), (names[3:5], [1, 2]), (names[4:], [2, 1])]
    rows = {
        "ours.json": [{"prompt": "a cat", "generations": paths, "ranking": ranks} for paths, ranks in groups],
        "test.json": [{"prompt": "a cat", "image_path": paths, "rank": ranks} for paths, ranks in groups],
    }
    for name, value in rows.items():
        (tmp_path / name).write_text(json.dumps(value))
    pairs = groups[1:]
    files = [[(tmp_path / name).read_bytes() for name in paths] for paths, _ in pairs]
    columns = {f"jpg_{k}": [row[k] for row in files] for k in range(2)}
    columns |= {f"label_{k}": [float(ranks[k] == 1) for _, ranks in pairs] for k in range(2)}
    parquet.write_table(pyarrow.table({"caption": ["a cat", "a cat"], **columns}), tmp_path / "pick.parquet")

    def scores(name, *more):
        report = json.loads(printed(capsys, "--model", "tiny", "--data", tmp_path / name, "--json", *more))
        return [row["scores"]["tiny"] for row in report["prompts"]], report["models"]["tiny"]["accuracy"]

    ours = scores("ours.json")
    assert scores("test.json") == ours and ours[1]["cases"] == 5
    found, accuracy = scores("pick.parquet", "--html", tmp_path / "page.html")
    np.testing.assert_allclose(found, ours[0][1:], atol=1e-5)
    assert accuracy["cases"] == 2
    assert len([tag for tag, _ in Page((tmp_path / "page.html").read_text()).tags if tag == "img"]) == 4


def test_prompts_of_a_tsv_and_of_a_text_file(generations, loaded, capsys, tmp_path):
    """Names of images by number, as `generate --prompts` gives them."""
    for model in ("alpha", "beta"):
        (tmp_path / "images" / model).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "images" / model / f"{i}_0.png").write_bytes(
                (generations / "images" / model / f"000{i}_0.png").read_bytes()
            )
    (tmp_path / "p.tsv").write_text("Prompt\tOther\na dog\tx\na cat\ty\n")
    (tmp_path / "p.txt").write_text("a dog\n\na cat\n")
    (tmp_path / "xy.txt").write_text("x\ny\n")
    arguments = ["--model", "tiny", "--images", tmp_path / "images", "--json", "--data"]
    files = [("p.tsv",), ("p.txt",), ("p.tsv", "--prompt-column", "Other"), ("xy.txt",)]
    found = [json.loads(printed(capsys, *arguments, tmp_path / name, *more))["models"] for name, *more in files]
    assert found[0] == found[1] != found[2] == found[3] and set(found[0]["tiny"]["mean_score"]) == {"alpha", "beta"}


def test_models_come_out_in_the_right_order_on_shapes(capsys):
    """tiny-shapes was trained on such images: far above half; random about half; the intervals do not meet."""
    arguments = ["--data", "shapes:held_out", "--limit", 40, "--json"]
    models = json.loads(printed(capsys, "--model", "tiny-shapes", "--model", "random", *arguments))["models"]
    assert models["tiny-shapes"]["accuracy"]["low"] > max(0.7, models["random"]["accuracy"]["high"])
    assert models["random"]["accuracy"]["low"] < 0.5 < models["random"]["accuracy"]["high"]


def test_shapes_without_spoilt_images_differ_in_their_words_alone():
    """The rank is the number of words that the rule-based checker finds right, in every image."""
    from imagereward_jax.agreement.sources import load_evaluation
    from imagereward_jax.data.shapes import words_right

    for group in load_evaluation("shapes:held_out", limit=20, spoilt=False):
        right = [sum(words_right(group.prompt, image).values()) for image in group.images]
        assert sorted(group.ranks) == [1, 2, 3, 4]
        assert np.argsort(group.ranks).tolist() == np.argsort(right)[::-1].tolist()


def test_an_export_is_called_by_its_run():
    from imagereward_jax.agreement.page import short_names

    assert short_names(["runs/first/export", "tiny-shapes", "runs/second/export"]) == ["first", "tiny-shapes", "second"]
    assert short_names(["a/first/export", "b/first"]) == ["a/first/export", "b/first"]


def test_generators_are_ranked_by_mean_score(generations, tiny_reward, loaded, capsys):
    """Means within 1e-5 of `score`'s; rho 1 to that very order, -1 to its reverse."""
    folder = generations / "images"
    means = {
        model: np.mean(
            [
                tiny_reward.score(f"a dog on the {i}", [folder / model / f"000{i}_{k}.png" for k in range(2)])
                for i in range(3)
            ]
        )
        for model in ("alpha", "beta", "gamma")
    }
    best_first = sorted(means, key=lambda name: -means[name])
    arguments = ["--model", "tiny", "--data", generations / "prompts.json", "--images", folder, "--json"]
    for order, rho in ((best_first, 1), (best_first[::-1], -1)):
        report = json.loads(printed(capsys, *arguments, "--human-order", ",".join(order)))["models"]["tiny"]
        assert report["spearman"]["value"] == pytest.approx(rho)
        for name, mean in means.items():
            assert report["mean_score"][name]["value"] == pytest.approx(mean, abs=1e-5)
    text = printed(capsys, *arguments[:-1])
    assert [line.split()[0] for line in text.splitlines()[1:4]] == best_first
    assert "--human-order" in text


class Page(html.parser.HTMLParser):
    """What is on a page: its tags with attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_the_prompts_judged_worst_with_their_images(rankings, loaded, capsys, tmp_path):
    """Self-contained, prompts as text, worst first, images in people's order."""
    arguments = ["--data", rankings / "test.json", "--images", rankings / "images", "--html", tmp_path / "page.html"]
    printed(capsys, "--model", "tiny", "--model", "random", *arguments, "--show", 2)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in images)
    assert not any(
        ("src" in attrs and not attrs["src"].startswith("data:")) or "href" in attrs for _, attrs in page.tags
    )
    assert "<b>" not in text.split("</h3>")[0].split("<h3>")[1] and "number" in page.text
    report = json.loads(printed(capsys, "--model", "tiny", *arguments[:4], "--json"))
    wrong = {}
    for row in report["prompts"]:
        ranked = [(rank, score) for rank, score in zip(row["ranking"], row["scores"]["tiny"]) if rank is not None]
        pairs = [a[1] > b[1] for a in ranked for b in ranked if a[0] < b[0]]
        if pairs:
            wrong[row["prompt"]] = 1 - sum(pairs) / len(pairs)
    worst = sorted(wrong, key=lambda prompt: -wrong[prompt])[:2]
    places = [page.text.index(prompt) for prompt in worst]
    assert places == sorted(places)
    labels = [attrs["alt"] for attrs in images]
    sizes = {f"a red cat, number {i} <b>": n for i, n in enumerate((4, 3, 3, 1))}
    assert len(labels) == sum(sizes[prompt] for prompt in worst)


def test_rules_are_not_called_people_and_most_prompts_are_folded(capsys, tmp_path):
    page = tmp_path / "page.html"
    printed(capsys, "--model", "random", "--data", "shapes:held_out", "--limit", 8, "--html", page)
    found = Page(page.read_text(encoding="utf-8"))
    assert "disagree most with the rules: 8 of 8" in found.text and "people" not in found.text
    tags = [tag for tag, _ in found.tags]
    assert (tags.count("section"), tags.count("details")) == (3, 5)


def test_the_page_replaces_no_other_file(rankings, capsys, tmp_path):
    """Not notes, not the data itself; a page of its own, and any file if that is asked for."""
    arguments = ["--model", "random", "--data", str(rankings / "test.json"), "--images", str(rankings / "images")]
    data, notes = (rankings / "test.json").read_bytes(), tmp_path / "notes.html"
    notes.write_text("mine")
    for path in (notes, rankings / "test.json"):
        assert evaluate.main([*arguments, "--html", str(path)]) == 2
        assert "is no page of this command; choose another file, or pass --overwrite" in capsys.readouterr().err
    assert notes.read_text() == "mine" and (rankings / "test.json").read_bytes() == data
    assert evaluate.main([*arguments, "--html", str(notes), "--overwrite"]) == 0
    assert evaluate.main([*arguments, "--html", str(notes)]) == 0


BAD = {
    "misspelt file": (["--data", "{r}/tst.json"], "did you mean 'test.json'"),
    "missing image": (["--data", "{r}/test.json"], "test.json, row 1: .*no such image"),
    "ranks for other images": (["--data", "{b}/short.json"], "short.json, row 1: 'ranking' must be a list of 2"),
    "rank of zero": (["--data", "{b}/zero.json"], "zero.json, row 1: .*numbers from 1"),
    "no rankings and no --images": (["--data", "{g}/prompts.json"], "only id, prompt; .*also give --images DIR"),
    "column of rankings": (
        ["--data", "{r}/test.json", "--prompt-column", "id"],
        "--prompt-column is for prompts alone",
    ),
    "no such column": (
        ["--data", "{g}/prompts.json", "--images", "{g}/images", "--prompt-column", "promt"],
        "no column 'promt'; there are id, prompt; did you mean 'prompt'",
    ),
    "folder without generators": (["--data", "{g}/prompts.json", "--images", "{g}/images/beta"], "no folders in it"),
    "generator short of an image": (
        ["--data", "{g}/prompts.json", "--images", "{b}/images"],
        "0001_0.png is not there",
    ),
    "order of other generators": (
        ["--data", "{g}/prompts.json", "--images", "{g}/images", "--human-order", "alpha,beta"],
        "expected each of alpha, beta, gamma once",
    ),
    "unknown shapes": (["--data", "shapes:heldout"], "shapes:held_out"),
    "spoilt images of a file": (["--data", "{b}", "--no-spoilt"], "--no-spoilt is for shapes:held_out"),
    "model given twice": (["--data", "shapes:held_out", "--model", "random"], "twice"),
    "no folder for the page": (["--data", "shapes:held_out", "--html", "{b}/no/page.html"], "does not exist"),
    "level of 95": (["--data", "shapes:held_out", "--level", "95"], "between 0 and 1"),
    "k twice": (["--data", "shapes:held_out", "--k", "1", "1"], "different numbers"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    row = {"id": "0", "prompt": "a cat", "generations": ["a.png", "b.png"]}
    (folder / "short.json").write_text(json.dumps([{**row, "ranking": [1]}]))
    (folder / "zero.json").write_text(json.dumps([{**row, "ranking": [0, 1]}]))
    (folder / "images" / "delta").mkdir(parents=True)
    smooth(np.random.default_rng(0)).save(folder / "images" / "delta" / "0000_0.png")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_model_is_loaded(case, rankings, generations, broken, capsys, monkeypatch):
    arguments, message = BAD[case]
    monkeypatch.setattr("imagereward_jax.bulk_scoring.scorers.open_scorer", None)
    filled = [argument.format(r=rankings, g=generations, b=broken) for argument in arguments]
    assert evaluate.main(["--model", "random", *filled]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err), err


def test_a_model_that_is_not_there_is_named(capsys):
    assert evaluate.main(["--model", "ImageRewrad-v1.0", "--data", "shapes:held_out", "--limit", "2"]) == 2
    assert "did you mean 'ImageReward-v1.0'?" in capsys.readouterr().err
