"""Aspect-ratio buckets: their sizes, which image goes where, what it becomes, and batches of one size each."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import ExifTags, Image

pytest.importorskip("grain")

from imagereward_jax.data import images
from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.buckets import BucketBatches, bucket_sizes, make_buckets, nearest_size
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.pairs import load_pairs

# Of NovelAI's 2022 description: 512 x 768 pixels, steps of 64; here for a square of 512.
SIZES_OF_512 = [(704, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (320, 704)]
SHAPES = [(8, 8), (9, 9), (16, 8), (17, 8), (8, 16), (30, 20), (12, 8), (8, 13), (10, 10)]  # width and height


def test_sizes_keep_to_area_step_and_ratio():
    sizes = bucket_sizes(512, 64, 2.2)
    assert sizes == SIZES_OF_512
    assert bucket_sizes(512, 64, 1.0) == [(512, 512)]
    for size, step, ratio in ((1024, 64, 2.0), (1024, 128, 4.0), (768, 32, 3.0)):
        sizes = bucket_sizes(size, step, ratio)
        assert (size, size) in sizes and len(set(sizes)) == len(sizes)
        for height, width in sizes:
            assert height % step == width % step == 0 and height * width <= size**2
            assert max(height, width) <= ratio * min(height, width)
            assert (width, height) in sizes
            longer, shorter = max(height, width), min(height, width)
            assert longer * (shorter + step) > size**2  # no larger one of this width


def test_an_image_goes_where_the_least_of_it_is_cut_off():
    """Against the share of the image that is left after the crop."""
    rng = np.random.default_rng(0)
    for height, width in rng.integers(100, 2000, (200, 2)):
        kept = {(h, w): min(height * w / (width * h), width * h / (height * w)) for h, w in SIZES_OF_512}
        chosen = nearest_size(height, width, SIZES_OF_512)
        assert kept[chosen] >= max(kept.values()) - 1e-9


@pytest.fixture
def folder(tmp_path):
    """Nine images, named by their number, of `SHAPES`."""
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(SHAPES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"image {index}")
    return tmp_path


def test_every_image_is_in_one_bucket_resized_and_cropped_to_it(folder):
    """Pixels of a crop against Pillow's; SDXL is told the size before and the corner."""
    pairs = load_pairs(folder, image_size=8)
    buckets = make_buckets(pairs, bucket_sizes(8, 2, 2.0))
    assert {size: bucket.rows for size, bucket in buckets.items()} == {
        (6, 10): [2, 3, 5, 6],
        (8, 8): [0, 1, 8],
        (10, 6): [4, 7],
    }
    bucket = buckets[6, 10]
    assert bucket.prompts == ["image 2", "image 3", "image 5", "image 6"]
    item = bucket[2]  # 30 x 20, of which 10 x 7 covers 10 x 6
    with Image.open(folder / "5.png") as image:
        expected = np.asarray(image.resize((10, 7), Image.Resampling.BICUBIC))[:6] / 255
    np.testing.assert_allclose(item["image"], expected, atol=1e-6)
    assert item["prompt"] == "image 5"
    assert item["original_size"].tolist() == [20, 30] and item["crop_top_left"].tolist() == [0, 0]
    corners = {tuple(load_crop(folder, seed)["crop_top_left"].tolist()) for seed in range(20)}
    assert corners == {(0, 0), (1, 0)}


def load_crop(folder, seed):
    pairs = load_pairs(folder, image_size=8, crop="random")
    return make_buckets(pairs, bucket_sizes(8, 2, 2.0))[6, 10].fetch(2, np.random.default_rng(seed))


def test_the_size_is_that_of_the_image_as_shown(tmp_path):
    """A photograph that is turned by its EXIF block, from a file, from bytes and open; and of an array."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (30, 20)).save(tmp_path / "plain.jpg")
    turned = tmp_path / "turned.jpg"
    for image in (turned, turned.read_bytes(), Image.open(turned)):
        assert images.shown_size(image) == (30, 20) == images.open_image(image).size[::-1]
    assert images.shown_size(tmp_path / "plain.jpg") == (20, 30)
    assert images.shown_size(np.zeros((20, 30, 3), np.uint8)) == (20, 30)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(images.ImageError, match=r"broken\.png: not a readable image"):
        images.shown_size(tmp_path / "broken.png", "row 3")


def batches_of(folder, seed=3, **options):
    pairs = load_pairs(folder, image_size=8, crop="random", flip=True)
    buckets = make_buckets(pairs, bucket_sizes(8, 2, 2.0))
    named = {f"{width}x{height}": bucket for (height, width), bucket in buckets.items()}
    iterators = {
        name: make_iterator(bucket, batch_size=2 // options.get("process_count", 1), seed=seed, **options)
        for name, bucket in named.items()
    }
    return BucketBatches(iterators, {name: len(bucket) for name, bucket in named.items()}, seed)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one["prompt"] == other["prompt"]
        np.testing.assert_array_equal(one["image"], other["image"])


def test_batches_are_of_one_size_and_every_image_comes_equally_often(folder):
    batches = batches_of(folder)
    taken = take(batches, 225)
    batches.close()
    seen = Counter(prompt for batch in taken for prompt in batch["prompt"])
    assert len(seen) == len(SHAPES)
    for prompt, count in seen.items():  # 50 expected; the draws of three buckets have a deviation of some 7
        assert 25 < count < 75, prompt
    sizes = {batch["image"].shape for batch in taken}
    assert sizes == {(2, 6, 10, 3), (2, 8, 8, 3), (2, 10, 6, 3)}


def test_they_resume_bit_for_bit_and_two_processes_share_them(folder):
    batches = batches_of(folder)
    take(batches, 5)
    state, expected = json.loads(json.dumps(batches.get_state())), take(batches, 12)
    batches.close()
    again = batches_of(folder)
    again.set_state(state)
    assert_equal(take(again, 12), expected)
    again.close()
    both = []
    for index in range(2):
        part = batches_of(folder, process_index=index, process_count=2)
        part.set_state(state)
        both.append(take(part, 12))
        part.close()
    joined = [
        {
            "prompt": [prompt for pair in zip(*(part["prompt"] for part in parts)) for prompt in pair],
            "image": np.concatenate([part["image"] for part in parts]),
        }
        for parts in zip(*both)
    ]
    assert_equal(joined, expected)


def test_a_state_of_other_buckets_is_refused(folder):
    batches = batches_of(folder)
    state = batches.get_state()
    state["buckets"].pop("8x8")
    with pytest.raises(DataError, match="buckets of sizes 6x10, 10x6, but now the images are of 6x10, 8x8, 10x6"):
        batches.set_state(state)
    with pytest.raises(DataError, match="buckets of none"):
        batches.set_state({"examples": 4})
    with pytest.raises(DataError, match="shapes world"):
        make_buckets(load_pairs("shapes:train", image_size=8), [(8, 8)])
