"""Ranked groups in the file format that ImageReward publishes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data.errors import DataError
from imagereward_jax.data.groups import load_groups

REAL = Path(__file__).parents[3] / "shared" / "real" / "images"


@pytest.fixture
def folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (20 + i, 16), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder, **changes):
    row = {"id": "a", "prompt": "a cat", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2], **changes}
    path = folder / "test.json"
    path.write_text(json.dumps([{k: v for k, v in row.items() if v is not None}]))
    return path


def test_groups_keep_order_ranks_and_ties(folder):
    groups = load_groups(write(folder), image_size=8)
    item = groups[0]
    assert len(groups) == 1 and item["prompt"] == "a cat" and groups.groups[0].id == "a"
    assert item["images"].shape == (3, 8, 8, 3) and item["images"].dtype == np.float32
    assert np.allclose(item["images"][:, 0, 0, 0] * 255, [0, 10, 20], atol=1e-4)
    assert item["ranking"].tolist() == [2, 1, 2] and item["ranking"].dtype == np.int32


def test_shapes():
    groups = load_groups("shapes:held_out", image_size=32, shapes={"size": 3, "images_per_prompt": 5})
    assert len(groups) == 3 and groups[2]["images"].shape == (5, 32, 32, 3)


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/real/images beside the checkout")
def test_the_pictures_that_imagereward_published(tmp_path):
    row = {"id": 0, "prompt": "an ocean", "generations": [str(REAL / f"{i}.webp") for i in range(1, 5)]}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({**row, "ranking": [1, 2, 3, 4]}))
    images = load_groups(path)[0]["images"]
    assert images.shape == (4, 224, 224, 3) and 0 <= images.min() < 0.2 and 0.8 < images.max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ranking": [1, 2]}, r"row 1: 'ranking' must be a list of 3 ranks"),
        ({"ranking": [0, 1, 2]}, r"row 1: 'ranking' must hold whole numbers from 1 \(the best\) up; got \[0, 1, 2\]"),
        ({"ranking": [1, 2.5, 3]}, r"row 1: 'ranking' must hold whole numbers"),
        ({"ranking": None}, r"row 1: expected an object with 'ranking'"),
        ({"generations": ["0.png"]}, r"row 1: 'generations' must be a list of two or more"),
        ({"generations": ["0.png", "1.png", "9.png"]}, r"row 1: .*9\.png: no such picture; did you mean"),
        ({"generations": ["0.png", "1.png", 7]}, r"row 1: expected a picture or the path of one; got 7"),
        ({"prompt": ""}, r"row 1: the prompt is empty"),
    ],
)
def test_mistakes_are_told_with_file_and_row(folder, changes, message):
    with pytest.raises(DataError, match=r"test\.json, " + message):
        load_groups(write(folder, **changes))
