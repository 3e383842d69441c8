"""Prompts, names and paths of others are shown on a terminal and never steer it."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from imagereward_jax import evaluate, score
from imagereward_jax.terminal import Parser, escape, say

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b]0;owned\x07\x9b2J\u202egnp\r\n"


def test_what_steers_a_terminal_is_escaped_and_what_people_write_is_not():
    assert escape(HOSTILE) == r"\x1b]0;owned\x07\u009b2J\u202egnp\x0d\x0a"
    assert escape("\udce9\u2028\x7f\t") == r"\udce9\u2028\u007f\x09"
    plain = "a red cat 猫, naïve 👩\u200d🎨"  # with a joiner, which emoji and words of some languages need
    assert escape(plain) == plain and escape(Path("a/b")) == "a/b"


def test_lines_stay_lines_and_json_stays_json(capsys):
    say("one\ntwo\x1b")
    text = json.dumps({"image": HOSTILE + "\udce9\x7f"}, indent=2, ensure_ascii=False)
    say(text)
    printed = capsys.readouterr().out
    assert printed.startswith("one\ntwo\\x1b\n") and json.loads(printed.split("\n", 2)[2]) == json.loads(text)
    assert not set(printed) & set("\x1b\x07\x9b\u202e\x7f")


@pytest.fixture
def hostile_files(tmp_path):
    """Images, a table and a folder of generators whose names would steer a terminal."""
    name = HOSTILE.strip()
    for path in (tmp_path / f"{name}.png", tmp_path / "generators" / name / "1_0.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    (tmp_path / "rows.csv").write_text(f'prompt,image\na,"{name}gone.png"\n', encoding="utf-8", newline="")
    (tmp_path / "prompts.json").write_text('[{"id": "1", "prompt": "a"}]')
    return tmp_path, str(tmp_path / f"{name}.png")


def test_commands_escape_names_of_files_and_generators(hostile_files, capsys):
    """Tables and errors; JSON holds the very names."""
    folder, image = hostile_files
    few = ["--images", str(folder / "generators"), "--resamples", "2"]
    assert score.main(["--model", "random", "--prompt", "a", image]) == 0
    assert score.main(["--model", "random", "--input", f"{folder}/rows.csv", "--output", f"{folder}/out.csv"]) == 2
    assert evaluate.main(["--model", "random", "--data", f"{folder}/prompts.json", *few]) == 0
    with pytest.raises(SystemExit):
        Parser().parse_args([image])
    printed = capsys.readouterr()
    assert printed.out.count(r"\x1b]0;owned\x07") == 2
    assert re.search(r"error: .*\\x1b]0;owned\\x07.*\n.*usage: .*error: .*\\x1b]0;owned", printed.err, re.DOTALL)
    assert score.main(["--model", "random", "--prompt", "a", "--json", image]) == 0
    as_json = capsys.readouterr().out
    assert json.loads(as_json)["images"][0]["image"] == image
    assert not set(printed.out + printed.err + as_json) & set("\x1b\x07\x9b\u202e")


def test_everything_is_printed_by_the_one_function():
    """In the package and its scripts only `terminal` prints; the nodes for ComfyUI are copied, and run without it."""
    files = [*(ROOT / "imagereward_jax").rglob("*.py"), *(ROOT / "convert").glob("*.py")]
    files = [path for path in files if path.parent.name != "comfyui"]
    assert [path.name for path in files if re.search(r"\bprint\(", path.read_text(encoding="utf-8"))] == ["terminal.py"]
