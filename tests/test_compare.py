"""`imagereward compare`: several runs in one page, and what it says of folders that are none."""

import json
import re

import pytest

pytest.importorskip("ml_collections")

from recorded_run import evaluation, record

from imagereward_jax.compare import main

PROMPTS = ["a cat", "a dog", "a fish", "<b>a cow</b>"]
START = [[1.0], [1.0], [1.0], [1.0]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from the same start, of other learning rates; a third of another reward and method, without images."""
    folder = tmp_path_factory.mktemp("runs")
    for name, end, rate in (("slow", [[1.5], [1.1], [1.2], [1.0]], 1e-5), ("fast", [[1.4], [3.0], [0.2], [1.1]], 1e-3)):
        found = {0: evaluation(PROMPTS, START), 10: evaluation(PROMPTS, end, seed=len(name))}
        rows = [(5, {"eval/reward_mean": 9.0, "images": 50.0, "images_per_second": 5.0})]
        record(folder / name, found, rows, **{"optimizer": {"learning_rate": rate}})
    record(folder / "other", {}, [(step, {"eval/reward_mean": 1.0}) for step in (0, 10)], reward={"path": "PickScore"})
    record(folder / "begun", {}, [(1, {"refl/loss": 1.0})])
    (folder / "notes").mkdir()
    (folder / "taken.html").write_text("mine")
    return folder


def compared(folder, out, *names):
    assert main([*(str(folder / name) for name in names), "-o", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_two_runs_side_by_side(runs, tmp_path, capsys):
    """A line, a column and images of each; the prompt on which their ends differ most comes first."""
    page = compared(runs, tmp_path / "page.html", "slow", "fast")
    assert "wrote" in capsys.readouterr().out
    figure = page.partition("Over the training steps")[2].partition("</figure>")[0]
    assert {"line k0", "line k1"} <= set(re.findall(r'class="(line k\d)"', figure))
    headings = re.findall(r"<h4>(.*?)</h4>", page)
    assert headings[0] == "a dog" and "&lt;b&gt;a cow&lt;/b&gt;" in headings and len(headings) == 4
    assert re.findall(r"<p>([^<]*)</p><div class=\"images", page)[:3] == [
        "before: 1",
        "slow, step 10: 1.1",
        "fast, step 10: 3",
    ]
    rows = dict(re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page))
    values = {name: re.findall("<span>(.*?)</span>", cells) for name, cells in rows.items()}
    assert values["Reward, best"] == ["9 at step 5", "9 at step 5"]
    assert values['Reward <code class="soft">eval/reward_mean</code>'] == ["1 → <b>1.2</b>", "1 → <b>1.425</b>"]
    assert values["time in training steps"] == ["10 s", "10 s"] and values["images trained on"] == ["50", "50"]
    fields = {name: cells for name, cells in values.items() if name.startswith("<code>")}
    assert fields == {"<code>optimizer.learning_rate</code>": ["1e-05", "0.001"]}


def test_runs_that_cannot_be_compared_in_all_are_told(runs, tmp_path):
    page = compared(runs, tmp_path / "page.html", "slow", "other")
    assert "follow different rewards" in page and "Without images: other." in page
    assert page.count("<article") == 4
    assert "follow different rewards" not in compared(runs, tmp_path / "page.html", "slow")


def test_a_page_of_one_s_own_is_replaced_and_another_file_if_asked_for(runs, tmp_path):
    page = tmp_path / "page.html"
    compared(runs, page, "slow")
    compared(runs, page, "fast")
    page.write_text("mine")
    assert main([str(runs / "slow"), "-o", str(page)]) == 2 and page.read_text() == "mine"
    assert main([str(runs / "slow"), "-o", str(page), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{r}/slwo", "-o", "{r}/p.html"], r"RUN .*slwo: no such folder \(did you mean '.*slow'\?\)"),
        (["{r}/notes", "-o", "{r}/p.html"], r"notes/config.json: no such file; expected the workdir of a run"),
        (["{r}/begun", "-o", "{r}/p.html"], "begun: no evaluation in metrics.jsonl, which a run has after its first"),
        (["{r}/slow", "{r}/slow", "-o", "{r}/p.html"], "the same workdir was given twice"),
        (["{r}/slow", "-o", "{r}/taken.html"], "taken.html exists and is no page of this command; .*--overwrite"),
        (["{r}/slow", "-o", "{r}/no/p.html"], "the folder .*/no does not exist"),
    ],
)
def test_bad_input_is_one_line(runs, capsys, argv, message):
    assert main([argument.format(r=runs) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err), err
    assert not (runs / "p.html").exists()


def test_a_config_that_cannot_be_read_is_named(runs, tmp_path, capsys):
    workdir = record(tmp_path / "run", {0: evaluation(PROMPTS, START)})
    for text, message in (
        ("{", "is not valid JSON"),
        (json.dumps([1]), "should hold an object"),
        ("{}", "not the config of a run"),
    ):
        (workdir / "config.json").write_text(text)
        assert main([str(workdir), "-o", str(tmp_path / "p.html")]) == 2
        assert message in capsys.readouterr().err


def test_flags_that_are_not_there(capsys):
    for argv in (["runs/a", "--ouput", "x"], ["runs/a"], ["-o", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "usage:" in capsys.readouterr().err
