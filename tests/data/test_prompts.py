"""Every way to bring prompts gives the same list; every way to get them wrong is told with file and row."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.prompts import load_named_prompts, load_prompt_rows, load_prompts
from imagereward_jax.data.tables import read_table

PROMPTS = ["a cat, sitting", 'a "quoted" dog', "naïve café 日本"]
REAL = Path(__file__).parents[3] / "shared" / "real" / "refl_data.json"


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("key", ["text", "prompt", "caption", None])
def test_json_and_json_lines(tmp_path, key):
    rows = [{"id": i, key: p} for i, p in enumerate(PROMPTS)] if key else PROMPTS
    path = write(tmp_path / "p.json", json.dumps(rows))
    assert load_prompts(path) == PROMPTS
    path = write(tmp_path / "p.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert load_prompts(str(path)) == PROMPTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_and_text(tmp_path, encoding):
    quoted = [p.replace('"', '""') for p in PROMPTS]
    csv = "id,text\r\n" + "".join(f'{i},"{p}"\r\n' for i, p in enumerate(quoted))
    tsv = "id\ttext\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(PROMPTS))
    assert load_prompts(write(tmp_path / "p.csv", csv, encoding)) == PROMPTS
    assert load_prompts(write(tmp_path / "p.tsv", tsv, encoding)) == PROMPTS
    assert load_prompts(write(tmp_path / "p.txt", "\n".join(PROMPTS) + "\n\n", encoding)) == PROMPTS
    assert load_prompts(write(tmp_path / "p.txt", "\r\n".join(PROMPTS), encoding)) == PROMPTS


BLANK = {
    "p.txt": "\na cat \n\na dog\n   \nan owl\n",
    "p.jsonl": '\n{"text": "a cat "}\n\n{"text": "a dog"}\n  \n{"text": "an owl"}\n',
    "p.csv": "\nid,text\r\n1,a cat \r\n\r\n2,a dog\r\n,\r\n3,an owl\r\n",
    "p.tsv": "\nid\ttext\n1\ta cat \n\n2\ta dog\n\t \n3\tan owl",
}


@pytest.mark.parametrize("name", BLANK)
def test_blank_lines_are_left_out_and_counted(name, tmp_path, capsys):
    """In every format alike, those of empty cells too; later rows keep their line numbers."""
    path = write(tmp_path / name, BLANK[name])
    assert load_prompts(path) == ["a cat ", "a dog", "an owl"]
    assert capsys.readouterr().err == f"{path}: 3 blank lines are left out\n"
    assert read_table(path).where(2).endswith(f"line {len(BLANK[name].splitlines())}")


def test_quotes_in_tsv_are_text(tmp_path, capsys):
    """As in PartiPrompts.tsv, whose columns begin with capitals; values that are quoted as a whole are told."""
    rows = ['"G I G G L E" painted on a wall\tWriting', 'the words "Fly"\tOutdoor', '5" wide\tAbstract']
    path = write(tmp_path / "p.tsv", "\n".join(["Prompt\tCategory", *rows]) + "\n")
    assert load_prompts(path) == [row.split("\t")[0] for row in rows] and capsys.readouterr().err == ""
    write(path, 'Prompt\tCategory\n"a ""red"" cat"\tx\n')
    assert load_prompts(path) == ['"a ""red"" cat"']
    assert re.search(r"p\.tsv: values in quotes \(1 rows, the first on line 2\).*named \.csv", capsys.readouterr().err)
    assert load_prompts(path.rename(tmp_path / "p.csv")) == ['a "red" cat']


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_a_csv_is_split_as_its_header_says(delimiter, tmp_path):
    """Spreadsheets of many countries write semicolons."""
    path = write(tmp_path / "p.csv", f'id{delimiter}text\n1{delimiter}"a; b, c\td"\n2{delimiter}e\n')
    assert load_prompts(path) == ["a; b, c\td", "e"]


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"id": [0, 1, 2], "prompt": PROMPTS})
    data.to_parquet(tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet") == PROMPTS
    data.save_to_disk(tmp_path / "one")
    assert load_prompts(tmp_path / "one") == PROMPTS
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    assert load_prompts(tmp_path / "many") == PROMPTS
    assert load_prompts(tmp_path / "many", split="test") == PROMPTS[1:2]
    with pytest.raises(DataError, match="no split 'tset'; there are train, test; did you mean 'test'"):
        load_prompts(tmp_path / "many", split="tset")


def test_hub_names_go_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split != "train":
            raise ConnectionError("Couldn't reach the hub\nsecond line")
        return datasets.Dataset.from_dict({"caption": PROMPTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts("someone/prompts") == PROMPTS
    with pytest.raises(FileNotFoundError, match=r"^someone/prompts: no such file here.*split 'x'.*reach the hub$"):
        load_prompts("someone/prompts", split="x")
    assert asked == [("someone/prompts", "train"), ("someone/prompts", "x")]


def test_shapes():
    train, held_out = load_prompts("shapes:train"), load_prompts("shapes:held_out")
    assert len(train) == 176 and len(held_out) == 64 and set(train).isdisjoint(held_out)
    with pytest.raises(DataError, match="did you mean 'held_out'"):
        load_prompts("shapes:heldout")


def test_a_column_can_be_chosen(tmp_path):
    path = write(tmp_path / "p.csv", "text,long\nx,a long one\n")
    assert load_prompts(path) == ["x"]
    assert load_prompts(path, column="long") == ["a long one"]
    assert load_named_prompts(path, "long") == {"0": "a long one"}
    with pytest.raises(DataError, match="there are words: say which with --prompt-column"):
        load_named_prompts(write(tmp_path / "q.csv", "words\nx\n"))


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/real/refl_data.json beside the checkout")
def test_the_prompts_that_imagereward_published():
    loaded = load_prompts(REAL)
    assert len(loaded) == 10_000
    assert loaded == [row["text"] for row in json.loads(REAL.read_text())]


MISTAKES = {
    "broken json": ("p.json", '["a",\n"b" "c"]', r"p\.json, line 2, column 5: broken JSON"),
    "json lines as json": ("p.json", '{"text": "a"}\n{"text": "b"}', r"p\.json, line 2.*named \.jsonl"),
    "json object": ("p.json", '{"prompts": ["a"]}', r"expected a JSON list .* got an object with 'prompts'"),
    "broken json line": ("p.jsonl", '{"text": "a"}\n\n{"text": ', r"p\.jsonl, line 3, column \d+: broken JSON"),
    "no rows": ("p.json", "[]", r"p\.json: there are no rows"),
    "empty file": ("p.txt", "", r"p\.txt: there are no rows"),
    "only a header": ("p.csv", "text\n", r"p\.csv: there are no rows"),
    "empty prompt": ("p.json", '["a", " ", ""]', r"p\.json, row 2: the prompt is empty \(2 rows like this\)"),
    "zeros": ("p.txt", "\0" * 9, r"p\.txt, line 1: the prompt holds a NUL character"),
    "only blank lines": ("p.txt", "\n  \n", r"p\.txt: there are no rows"),
    "an empty cell": ("p.csv", "id,text\n1,\n", r"p\.csv, line 2: the prompt in column 'text' is empty"),
    "a quoted tab": ("p.tsv", 'id\ttext\n1\t"a\tb"\n', r"p\.tsv, line 2: 3 values, .*quotes in \.tsv are text"),
    "a semicolon": ("p.csv", "id;text\n1;a; b\n", r"p\.csv, line 2: 3 values, .*that holds a semicolon in"),
    "a number": ("p.json", '["a", 5]', r"p\.json, row 2: the prompt must be a string; got int 5"),
    "null": ("p.jsonl", '{"text": "a"}\n{"text": null}', r"p\.jsonl, line 2: .*'text' must be a string; got nothing"),
    "all numbers": ("p.json", "[1, 2]", r"p\.json, row 1: expected an object with named columns; got int 1"),
    "no usual column": ("p.json", '[{"txt": "a"}]', r"none of the columns text, prompt, .*; there are txt: say"),
    "row without": ("p.json", '[{"text": "a"}, {"txt": "b"}]', r"row 2: expected an object with 'text'; .* 'txt'"),
    "a comma": (
        "p.csv",
        "id,text\n1,a cat, sitting\n",
        r"p\.csv, line 2: 3 values, but .* 2 columns \(id, text\).*quotes",
    ),
    "open quote": ("p.csv", 'id,text\n1,"a cat\n', r"p\.csv, line 2: broken CSV"),
    "suffix": ("p.yaml", "- a", r"p\.yaml: cannot tell what this file is; expected one of \.json"),
    "not parquet": ("p.parquet", "hello", r"p\.parquet: not a readable Parquet file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_with_file_and_row(tmp_path, case):
    name, text, message = MISTAKES[case]
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_wrong_column_is_told_with_the_nearest(tmp_path):
    path = write(tmp_path / "p.csv", "id,caption\n1,a\n")
    with pytest.raises(DataError, match=r"no column 'captoin'; there are id, caption; did you mean 'caption'\?"):
        load_prompts(path, column="captoin")
    with pytest.raises(DataError, match="row 1: expected an object with named columns; got a string"):
        load_prompts(write(tmp_path / "p.json", '["a"]'), column="text")


def test_a_wrong_encoding_is_told_with_the_line(tmp_path):
    path = write(tmp_path / "p.txt", "a\ncafé\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"p\.txt, line 2: byte 0xe9 is not UTF-8"):
        load_prompts(path)


def test_a_missing_file_is_told_with_the_nearest(tmp_path):
    write(tmp_path / "prompts.json", "[]")
    with pytest.raises(FileNotFoundError, match=r"promts\.json: no such data file.*did you mean 'prompts\.json'\?"):
        load_prompts(tmp_path / "promts.json")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist either"):
        load_prompts(tmp_path / "nowhere" / "p.json")
    with pytest.raises(DataError, match=r"a folder, but not one saved by `datasets`"):
        load_prompts(tmp_path)


def test_loading_prompts_imports_no_heavy_package(tmp_path):
    path = write(tmp_path / "p.json", '["a"]')
    code = (
        f"import sys; from imagereward_jax.data.prompts import load_prompts; load_prompts({str(path)!r}); "
        "print(*({'torch', 'tensorflow', 'datasets', 'grain', 'pyarrow'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_metadata_stays_with_its_prompt(tmp_path):
    """Columns of text and numbers come along row by row; images, and columns that some rows lack, do not."""
    rows = [{"prompt": f"p{i}", "rank": i, "tags": ["a", i], **({"some": 1} if i else {})} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded = load_prompt_rows(tmp_path / "rows.json")
    assert [loaded[i] for i in range(3)] == [
        {"prompt": f"p{i}", "metadata": {"rank": i, "tags": ["a", i]}} for i in range(3)
    ]
    assert load_prompt_rows("shapes:train")[0]["metadata"] == {}
