"""The score command: its table, its JSON, and its errors, each one line with exit status 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from imagereward_jax import score


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{name}.png") for name in "abc"]
    for path in paths:
        coarse = Image.fromarray((rng.random((3, 3, 3)) * 255).astype(np.uint8))
        coarse.resize((48, 40), Image.BICUBIC).save(path)
    return paths


@pytest.fixture(scope="module")
def printed_json(tiny_reward_folder, images):
    """What a real run of the command prints."""
    command = [sys.executable, "-m", "imagereward_jax.score", "--model", str(tiny_reward_folder), "--json"]
    done = subprocess.run([*command, "--prompt", "a red cat 猫", *images], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_json_has_the_models_scores_in_the_order_given(printed_json, tiny_reward, tiny_reward_folder, images):
    ranks, rewards = tiny_reward.inference_rank("a red cat 猫", images)
    assert printed_json["model"] == str(tiny_reward_folder) and printed_json["prompt"] == "a red cat 猫"
    assert [row["image"] for row in printed_json["images"]] == images
    assert [row["rank"] for row in printed_json["images"]] == ranks
    np.testing.assert_allclose([row["score"] for row in printed_json["images"]], rewards, atol=1e-5)


def test_the_table_is_sorted(printed_json, tiny_reward_folder, images, capsys):
    assert score.main(["--model", str(tiny_reward_folder), "--prompt", "a red cat 猫", *images]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "image"]
    best = sorted(printed_json["images"], key=lambda row: -row["score"])
    assert [line.split()[2] for line in lines[1:]] == [row["image"] for row in best]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    np.testing.assert_allclose([float(line.split()[1]) for line in lines[1:]], [r["score"] for r in best], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dir}/gone.png"], "{dir}/gone.png: no such image"),
        (["{good}", "{dir}/broken.png"], "{dir}/broken.png: not a readable image (cut short, or none of PNG"),
        (["{good}", "--batch-size", "0"], "--batch-size 0 should be from 1 to 65,536"),
        (["{good}", "--tokenizer", "{dir}/gone.txt"], "{dir}/gone.txt: no such file; expected a vocab.txt"),
        (["{good}", "--model", "ImageRewrad-v1.0"], "did you mean 'ImageReward-v1.0'?"),
        (["{good}", "--model", "pickscroe"], "did you mean 'PickScore'?"),
        (["{good}", "--model", "jpeg-compresibility"], "did you mean 'jpeg-compressibility'?"),
        (["{good}", "--model", "randm"], "did you mean 'random'?"),
        (["{good}", "--model", "{dir}/PickScore"], "{dir}/PickScore: no such file or folder"),
    ],
)
def test_errors_are_one_line(arguments, message, tiny_reward_folder, images, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("not an image")
    names = {"dir": tmp_path, "good": images[0]}
    arguments = [argument.format(**names) for argument in arguments]
    assert score.main(["--model", str(tiny_reward_folder), "--prompt", "a cat", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message.format(**names) in err


def test_a_missing_prompt_is_asked_for(capsys):
    with pytest.raises(SystemExit) as exit_:
        score.main(["picture.png"])
    assert exit_.value.code == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["random", "jpeg-compressibility"])
def test_a_table_and_the_command_line_give_the_same_scores(name, images, tmp_path, capsys):
    """Of names that read no weights; those that do are in tests/rewards/test_scores.py."""
    assert score.main(["--model", name, "--prompt", "a red cat", "--json", *images]) == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    table = [{"prompt": "a red cat", "image": path} for path in images]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    files = ["--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "out.json")]
    assert score.main(["--model", name, *files]) == 0
    scored = [row["score"] for row in json.loads((tmp_path / "out.json").read_text())]
    np.testing.assert_allclose([row["score"] for row in rows], scored, rtol=1e-6)
    assert len(set(scored)) == 3
    assert [row["rank"] for row in rows] == [1 + sum(other > mine for other in scored) for mine in scored]
