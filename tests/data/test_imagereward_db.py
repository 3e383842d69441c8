"""Ranked groups in the forms of ImageRewardDB, pairs of them, padding and the cache of decoded pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.groups import Pairs, load_groups, padded

PROMPTS = ["a cat", "a dog"]
RANKS = {0: [2, 1, 2], 1: [1, 2]}  # two prompts, of three and of two pictures


@pytest.fixture
def pictures(tmp_path):
    """images/train/P_K.png, each of a colour of its own."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for prompt, ranks in RANKS.items():
        for k in range(len(ranks)):
            Image.new("RGB", (10, 12), (40 * prompt, 20 * k, 7)).save(folder / f"{prompt}_{k}.png")
    return tmp_path


def one_picture_a_row(**more):
    return [
        {
            "image_path": f"images/train/{prompt}_{k}.png",
            "prompt_id": f"id{prompt}",
            "prompt": PROMPTS[prompt],
            "image_amount_in_total": len(ranks),
            "rank": rank,
            "overall_rating": 4,
            **more,
        }
        for prompt, ranks in RANKS.items()
        for k, rank in enumerate(ranks)
    ]


def assert_the_groups(groups):
    assert len(groups) == 2
    for i in range(2):
        item = groups[i]
        assert item["prompt"] == PROMPTS[i] and item["ranking"].tolist() == RANKS[i]
        colours = np.round(item["images"][:, 0, 0] * 255)
        np.testing.assert_array_equal(colours, [[40 * i, 20 * k, 7] for k in range(len(RANKS[i]))])


def test_json_of_one_picture_a_row(pictures):
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row()))
    groups = load_groups(pictures / "train.json", image_size=8)
    assert_the_groups(groups)
    assert groups.groups[1].id == "id1" and groups.largest == 3


def test_json_of_the_training_code_beside_a_folder_of_images(pictures):
    """{"prompt", "generations", "ranking"}, paths relative to the images' folder."""
    rows = [
        {"prompt": PROMPTS[p], "generations": [f"{p}_{k}.png" for k in range(len(ranks))], "ranking": ranks}
        for p, ranks in RANKS.items()
    ]
    (pictures / "train.json").write_text(json.dumps(rows))
    assert_the_groups(load_groups(pictures / "train.json", image_size=8, images=pictures / "images" / "train"))
    with pytest.raises(DataError, match=r"train.json, row 1: .*0_0.png: no such image"):
        load_groups(pictures / "train.json", image_size=8)
    with pytest.raises(DataError, match="no such folder of images"):
        load_groups(pictures / "train.json", images=pictures / "imges")


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets")


def saved(datasets, columns, features, pictures):
    data = datasets.Dataset.from_dict(columns).cast(datasets.Features(features))
    datasets.DatasetDict({"validation": data}).save_to_disk(pictures / "saved")
    return load_groups(pictures / "saved", image_size=8, split="validation")


def test_datasets_form_of_one_picture_a_row(datasets, pictures):
    rows = one_picture_a_row()
    columns = {name: [row[name] for row in rows] for name in ("prompt_id", "prompt", "rank")}
    columns["image"] = [str(pictures / row["image_path"]) for row in rows]
    text, number = datasets.Value("string"), datasets.Value("int8")
    features = {"prompt_id": text, "prompt": text, "rank": number, "image": datasets.Image()}
    assert_the_groups(saved(datasets, columns, features, pictures))


def test_datasets_form_of_groups(datasets, pictures):
    columns = {"prompt_id": ["id0", "id1"], "prompt": PROMPTS, "rank": list(RANKS.values())}
    columns["image"] = [
        [str(pictures / f"images/train/{p}_{k}.png") for k in range(len(ranks))] for p, ranks in RANKS.items()
    ]
    text = datasets.Value("string")
    features = {"prompt_id": text, "prompt": text, "rank": datasets.List(datasets.Value("int8"))}
    assert_the_groups(saved(datasets, columns, features | {"image": datasets.List(datasets.Image())}, pictures))


def test_datasets_form_of_pairs(datasets, pictures):
    columns = {"prompt": ["a dog"], "img_better": [str(pictures / "images/train/1_0.png")]}
    columns["img_worse"] = [str(pictures / "images/train/1_1.png")]
    features = {"prompt": datasets.Value("string"), "img_better": datasets.Image(), "img_worse": datasets.Image()}
    groups = saved(datasets, columns, features, pictures)
    assert len(groups) == 1 and groups[0]["ranking"].tolist() == [1, 2]
    np.testing.assert_array_equal(np.round(groups[0]["images"][:, 0, 0, 1] * 255), [0, 20])


def test_pairs_of_different_rank(pictures):
    """Of 2, 1, 2 the tie makes no pair; only the two pictures of a pair are read."""
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row()))
    groups = load_groups(pictures / "train.json", image_size=8)
    pairs = Pairs(groups)
    assert pairs.index.tolist() == [[0, 0, 1], [0, 1, 2], [1, 0, 1]]
    (pictures / "images/train/0_0.png").unlink()
    item = pairs[1]
    assert item["prompt"] == "a cat" and item["ranking"].tolist() == [1, 2] and item["images"].shape == (2, 8, 8, 3)
    with pytest.raises(DataError, match=r"0_0\.png"):
        pairs[0]


def test_pairs_of_the_shapes_world():
    groups = load_groups("shapes:train", image_size=16, shapes={"size": 3, "images_per_prompt": 4})
    pairs = Pairs(groups)
    assert len(pairs) == 3 * 6
    item, whole = pairs[7], groups[1]
    np.testing.assert_array_equal(item["images"], whole["images"][[0, 2]])
    np.testing.assert_array_equal(item["ranking"], whole["ranking"][[0, 2]])


def test_padding_adds_pictures_of_rank_0(pictures):
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row()))
    item = padded(load_groups(pictures / "train.json", image_size=8)[1], 4)
    assert item["ranking"].tolist() == [1, 2, 0, 0] and item["images"].shape == (4, 8, 8, 3)
    assert not item["images"][2:].any()


def test_the_cache_serves_what_was_decoded_and_notices_a_new_file(pictures):
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row()))
    cache = pictures / "cache"
    plain = load_groups(pictures / "train.json", image_size=8)[0]["images"]
    first = load_groups(pictures / "train.json", image_size=8, cache=cache)[0]["images"]
    kept = sorted(cache.rglob("*.npy"))
    np.testing.assert_array_equal(first, plain)
    assert len(kept) == 3
    for file in kept:
        np.save(file, np.load(file) + np.uint8(1))  # what is read next comes from here
    second = load_groups(pictures / "train.json", image_size=8, cache=cache)[0]["images"]
    np.testing.assert_allclose(second, plain + 1 / 255, atol=1e-6)
    Image.new("RGB", (30, 30), (9, 9, 9)).save(pictures / "images/train/0_0.png")
    np.testing.assert_allclose(load_groups(pictures / "train.json", image_size=8, cache=cache)[0]["images"][0], 9 / 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"train.json, row 1: 'ranking' must hold whole numbers from 1"),
        ({"rank": "best"}, r"train.json, row 1: 'ranking' must hold whole numbers from 1"),
        ({"image_path": "images/none.png"}, r"train.json, row 1: .*images/none.png: no such image"),
        ({"prompt": " "}, r"train.json, row 1: the prompt is empty"),
    ],
)
def test_mistakes_are_told_with_file_and_row(pictures, change, message):
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row(**change)))
    with pytest.raises(DataError, match=message):
        load_groups(pictures / "train.json")


def test_prompts_with_one_picture_are_left_out(pictures):
    (pictures / "train.json").write_text(json.dumps(one_picture_a_row()[-1:]))
    with pytest.raises(DataError, match="no prompt has two images"):
        load_groups(pictures / "train.json")
