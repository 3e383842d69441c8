"""Preferences in every form: which two images, the preferred first; ties; what is broken is named."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.preferences import load_preferences

COLOURS = [10, 60, 110, 160, 210]


def encoded(colour):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(encoded(colour))
    return tmp_path


def colours_of(found):
    """[(prompt, red of the preferred image, of the other)]"""
    items = [found[index] for index in range(len(found))]
    assert all(item["image"].shape == (2, 8, 8, 3) for item in items)
    return [(item["prompt"], *np.round(255 * item["image"][:, 0, 0, 0]).astype(int).tolist()) for item in items]


def test_pick_a_pic_as_parquet(folder, capsys):
    """Either label, bytes in the columns; a tie is left out and counted, as is a row without a label."""
    datasets = pytest.importorskip("datasets")
    rows = [("a", 10, 60, 1.0, 0.0), ("b", 110, 160, 0.5, 0.5), ("c", 210, 60, 0.0, 1.0), ("d", 10, 60, 0.0, 0.0)]
    columns = {
        "caption": [row[0] for row in rows],
        "jpg_0": [encoded(row[1]) for row in rows],
        "jpg_1": [encoded(row[2]) for row in rows],
        "label_0": [row[3] for row in rows],
        "label_1": [row[4] for row in rows],
        "has_label": [True, True, True, False],
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "pick.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    for source in ("pick.parquet", "saved"):
        found = load_preferences(folder / source, image_size=8)
        assert colours_of(found) == [("a", 10, 60), ("c", 60, 210)] and found.ties == 1
        assert found.prompts == ["a", "c"]
        assert capsys.readouterr().err.endswith(f"{source}: 1 rows without a label are left out\n")


def write(folder, rows):
    (folder / "p.json").write_text(json.dumps(rows))
    return folder / "p.json"


def test_ranked_groups_give_every_pair_of_different_rank(folder):
    """The scorer's JSON, ImageRewardDB's rows, pairs by name; three images of which two are equal make two pairs."""
    names = ["10.png", "60.png", "110.png"]
    found = load_preferences(write(folder, [{"prompt": "a", "generations": names, "ranking": [2, 1, 2]}]), image_size=8)
    assert colours_of(found) == [("a", 60, 10), ("a", 60, 110)] and found.ties == 1
    rows = [{"prompt_id": "1", "prompt": "a", "image_path": name, "rank": rank} for name, rank in zip(names, (3, 1, 2))]
    found = load_preferences(write(folder, rows), image_size=8)
    assert sorted(colours_of(found)) == [("a", 60, 10), ("a", 60, 110), ("a", 110, 10)]
    found = load_preferences(
        write(folder, [{"prompt": "b", "img_better": "160.png", "img_worse": "210.png"}]), image_size=8
    )
    assert colours_of(found) == [("b", 160, 210)]


def test_a_folder_of_chosen_and_rejected(folder):
    """Images of the same names, of any suffix; captions beside the chosen ones."""
    for name, colour, caption in (("chosen/1.png", 10, "a"), ("chosen/2.png", 60, "b")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(colour))
        (folder / name).with_suffix(".txt").write_text(caption)
    (folder / "rejected").mkdir()
    (folder / "rejected/1.png").write_bytes(encoded(110))
    with pytest.raises(DataError, match=r"2\.txt: .*rejected has no image 2 beside .*2\.png"):
        load_preferences(folder, image_size=8)
    Image.new("RGB", (16, 16), (160, 0, 0)).save(folder / "rejected/2.bmp")
    assert colours_of(load_preferences(folder, image_size=8)) == [("a", 10, 110), ("b", 60, 160)]


def test_images_of_a_pair_are_mirrored_each_by_itself(folder):
    """Of 40 draws all four combinations come; without a generator none is mirrored."""
    ramp = np.tile(np.arange(16, dtype=np.uint8)[None, :, None] * 16, (16, 1, 3))
    Image.fromarray(ramp).save(folder / "ramp.png")
    source = write(folder, [{"prompt": "b", "img_better": "ramp.png", "img_worse": "ramp.png"}])
    found = load_preferences(source, image_size=16, flip=True)
    seen = {tuple((found.fetch(0, np.random.default_rng(i))["image"][:, 0, 0, 0] > 0.5).tolist()) for i in range(40)}
    assert len(seen) == 4 and not (found[0]["image"][:, 0, 0, 0] > 0.5).any()


def test_shapes_are_the_best_and_the_worst_of_a_group():
    found = load_preferences("shapes:train", image_size=32, shapes={"size": 5, "images_per_prompt": 3})
    group = found.groups[2]
    assert len(found) == 5 and found[2]["image"].shape == (2, 32, 32, 3) and found[2]["prompt"] == group["prompt"]
    best, worst = (group["images"][group["ranking"].tolist().index(rank)] for rank in (1, 3))
    np.testing.assert_array_equal(found[2]["image"], [best, worst])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"caption": "a", "jpg_0": "10.png", "jpg_1": "60.png", "label_0": 1, "label_1": 1}], r"row 1: label_0=1 and"),
        ([{"caption": "a", "jpg_0": "10.png", "label_0": 1, "label_1": 0}], "jpg_1"),
        ([{"caption": "a", "jpg_0": "10.png", "jpg_1": "60.png", "label_0": 1}], "label_1"),
        (
            [{"caption": "a", "jpg_0": "10.png", "jpg_1": "60.png", "label_0": 0.5, "label_1": 0.5}],
            "p.json: all of 1 pairs are ties",
        ),
        ([{"prompt": "a", "image": "10.png"}], "rank"),
        ([{"prompt": "a", "image_path": ["10.png", "60.png"], "rank": [1]}], "row 1: 'rank' must be a list of 2 whole"),
        ([{"prompt": "a", "image_path": ["10.png", "60.png"], "rank": [1, -1]}], "row 1: 'rank' must be a list of 2"),
        ([{"prompt": "a", "image_path": ["10.png", "6.png"], "rank": [1, 2]}], r"row 1: .*6\.png: no such image"),
        ([{"prompt": "a", "file_path": "10.png", "human_preference": [1, 0]}], "row 1: 'file_path' must be a list"),
        (
            [{"prompt": "a", "file_path": ["10.png", "60.png"], "human_preference": [2, 0]}],
            "row 1: 'human_preference' must hold 1 for the preferred image and 0",
        ),
        ([{"prompt": "a", "generations": ["10.png", "none.png"], "ranking": [1, 2]}], "none.png"),
    ],
)
def test_broken_rows_are_named(folder, rows, said):
    with pytest.raises(DataError, match=said):
        load_preferences(write(folder, rows), image_size=8)


def test_hpdv2_as_published(folder):
    """test.json: lists of images and ranks, from 1 or 0, equal prompts apart; train.json: the preferred of two."""
    rows = [
        {"prompt": "a", "image_path": ["10.png", "60.png", "110.png"], "rank": [2, 3, 1], "raw_annotations": []},
        {"prompt": "a", "image_path": ["160.png", "210.png"], "rank": [1, 0], "raw_annotations": []},
    ]
    found = load_preferences(write(folder, rows), image_size=8)
    assert sorted(colours_of(found)) == [("a", 10, 60), ("a", 110, 10), ("a", 110, 60), ("a", 210, 160)]
    for column in ("file_path", "image_path"):
        rows = [{"prompt": "b", column: ["10.png", "60.png"], "human_preference": [0, 1], "user_hash": "x"}]
        assert colours_of(load_preferences(write(folder, rows), image_size=8)) == [("b", 60, 10)]
