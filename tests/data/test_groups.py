"""Ranked groups in the file format that ImageReward publishes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.groups import load_groups
from imagereward_jax.data.images import IMAGE_RULES
from imagereward_jax.rewards import preprocess

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


def original(path, size):
    """The original ImageReward's transform (torchvision's Resize and CenterCrop on PIL images), step by step."""
    image = Image.open(path)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    longer = int(size * long / short)
    shape = (size, longer) if width <= height else (longer, size)
    image = image.resize(shape, Image.BICUBIC) if shape != (width, height) else image
    left, top = round((shape[0] - size) / 2.0), round((shape[1] - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


def written(path, index, rng):
    """An image of a random size: opaque, transparent, with a palette, grey with alpha, or to be rotated by its EXIF."""
    width, height = (int(side) for side in rng.integers(9, 90, 2))
    pixels = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    mode = ("RGB", "RGBA", "P", "LA", "EXIF")[index % 5]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = pixels.convert("RGB").quantize(8) if mode == "P" else pixels.convert("RGB" if mode == "EXIF" else mode)
    image.save(path, **({"transparency": 0} if mode == "P" else {"exif": exif} if mode == "EXIF" else {}))
    return path


def assert_trained_on_as_scored(paths, size, folder, rule, **options):
    """To the bit: the pixels of a group, by its rule those of the original, and those that the scorer normalises."""
    row = {"prompt": "a", "generations": [str(path) for path in paths], "ranking": list(range(1, len(paths) + 1))}
    (folder / "rows.json").write_text(json.dumps([row]))
    pixels = load_groups(folder / "rows.json", image_size=size, image_rule=rule, **options)[0]["images"]
    for path, trained_on in zip(paths, pixels, strict=True):
        if rule == "original":
            expected = original(path, size).astype(np.float32) / np.float32(255)
            np.testing.assert_array_equal(trained_on, expected, str(path))
        scored = preprocess.host_pixels(path, size, rule=rule)
        normalised = (trained_on - np.float32(preprocess.CLIP_MEAN)) / np.float32(preprocess.CLIP_STD)
        np.testing.assert_array_equal(normalised, scored, str(path))


def test_a_scorer_trains_on_the_pixels_that_it_scores(tmp_path):
    """Random sizes and kinds of images, larger and smaller than the square, with the cache and without."""
    rng = np.random.default_rng(0)
    for size in (16, 31):
        paths = [written(tmp_path / f"{size}_{index}.png", index, rng) for index in range(100)]
        for rule in IMAGE_RULES:
            assert_trained_on_as_scored(paths, size, tmp_path, rule)
            for _ in range(2):  # filled, then read
                assert_trained_on_as_scored(paths, size, tmp_path, rule, cache=tmp_path / "cache")


def test_plain_images_are_the_originals_by_either_rule(tmp_path):
    """RGB, grey, and both with an alpha channel that hides nothing: to the bit, at random sizes."""
    rng = np.random.default_rng(1)
    for index in range(40):
        mode = ("RGB", "L", "RGBA", "LA")[index % 4]
        pixels = rng.integers(0, 256, (*rng.integers(9, 90, 2), 4), dtype=np.uint8)
        pixels[..., 3] = 255
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).convert(mode).save(path)
        np.testing.assert_array_equal(images.open_square(path, 31), original(path, 31), mode)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK"])
def test_images_of_other_modes_are_rgb_before_they_are_resized(mode, tmp_path):
    """A palette's colours are mixed as those of an RGB image; the original takes its nearest pixels."""
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (50, 70, 3), dtype=np.uint8)).convert(mode)
    image.convert("RGB").save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(images.open_square(image, 31), original(tmp_path / "rgb.png", 31))


def test_the_cache_holds_nothing_of_the_rules_before(folder):
    """Files named as before, when images were read by other rules, are not served."""
    groups = load_groups(write(folder), image_size=8, cache=folder / "cache")
    expected = groups[0]["images"]
    for file in (folder / "cache").rglob("*-8-shown.npy"):
        for old in ("", "-square"):
            np.save(file.with_name(file.name.replace("-shown", old)), np.zeros((8, 8, 3), np.uint8))
        file.unlink()
    np.testing.assert_array_equal(groups[0]["images"], expected)


def test_images_that_cannot_be_resized_are_named(folder):
    groups = load_groups(write(folder), image_size=8)
    Image.new("RGB", (1, 60_000)).save(folder / "1.png")
    with pytest.raises(DataError, match=r"test\.json, row 1: .*1\.png: 1 x 60000 pixels is too long and thin"):
        load_groups(write(folder), image_size=224)[0]
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"test\.json, row 1: .*1\.png: not a readable image"):
        groups[0]


def test_shapes():
    groups = load_groups("shapes:held_out", image_size=32, shapes={"size": 3, "images_per_prompt": 5})
    assert len(groups) == 3 and groups[2]["images"].shape == (5, 32, 32, 3)


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/real/images beside the checkout")
def test_the_images_that_imagereward_published(tmp_path):
    """To the bit the original's pixels, by either rule."""
    paths = [REAL / f"{i}.webp" for i in range(1, 5)]
    assert_trained_on_as_scored(paths, 224, tmp_path, "original")
    for path in paths:
        np.testing.assert_array_equal(images.open_square(path, 224), original(path, 224))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ranking": [1, 2]}, r"row 1: 'ranking' must be a list of 3 ranks"),
        ({"ranking": [0, 1, 2]}, r"row 1: 'ranking' must hold whole numbers from 1 \(the best\) up; got \[0, 1, 2\]"),
        ({"ranking": [1, 2.5, 3]}, r"row 1: 'ranking' must hold whole numbers"),
        ({"ranking": None}, r"row 1: expected an object with 'ranking'"),
        ({"generations": ["0.png"]}, r"row 1: 'generations' must be a list of two or more"),
        ({"generations": ["0.png", "1.png", "9.png"]}, r"row 1: .*9\.png: no such image; did you mean"),
        ({"generations": ["0.png", "1.png", 7]}, r"row 1: expected an image or the path of one; got 7"),
        ({"prompt": ""}, r"row 1: the prompt is empty"),
    ],
)
def test_mistakes_are_told_with_file_and_row(folder, changes, message):
    with pytest.raises(DataError, match=r"test\.json, " + message):
        load_groups(write(folder, **changes))
