"""Image-text pairs from every format, against pictures that the test made itself."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from imagereward_jax.data import images
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.pairs import load_pairs

CAPTIONS = ["a first picture", "a second one", "and a third"]


def picture(i):
    """32 x 48, three flat parts side by side: black, colour, white."""
    array = np.zeros((32, 48, 3), np.uint8)
    array[:, 8:40] = (60 * i + 20, 100, 200)
    array[:, 40:] = 255
    return Image.fromarray(array)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def rows():
    return [{"image": f"images/{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def check(pairs):
    """The middle 32 x 32 of each picture is its flat colour, so the item is known exactly."""
    assert len(pairs) == 3
    for i, caption in enumerate(CAPTIONS):
        item = pairs[i]
        assert item["prompt"] == caption
        assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.float32
        assert np.allclose(item["image"] * 255, (60 * i + 20, 100, 200), atol=1e-4)


def test_tables_with_paths(folder):
    check(load_pairs(write(folder / "p.json", rows()), image_size=32))
    check(load_pairs(write(folder / "p.jsonl", "\n".join(json.dumps(row) for row in rows())), image_size=32))
    csv = "text,image\n" + "".join(f"{row['text']},{folder / row['image']}\n" for row in rows())
    check(load_pairs(write(folder / "absolute.csv", csv), image_size=32))
    other = [{"where": row["image"], "words": row["text"]} for row in rows()]
    check(load_pairs(write(folder / "o.json", other), image_column="where", text_column="words", image_size=32))


def test_folders(folder):
    images = folder / "images"
    write(images / "metadata.csv", "file_name,text\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(CAPTIONS)))
    check(load_pairs(images, image_size=32))
    (images / "metadata.csv").unlink()
    lines = [json.dumps({"file_name": f"{i}.png", "text": c}) for i, c in enumerate(CAPTIONS)]
    write(images / "metadata.jsonl", "\n".join(lines))
    check(load_pairs(images, image_size=32))
    (images / "metadata.jsonl").unlink()
    for i, caption in enumerate(CAPTIONS):
        write(images / f"{i}.txt", caption + "\n")
    check(load_pairs(images, image_size=32))
    check(load_pairs(folder, image_size=32))
    (images / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1\.png: no caption 1\.txt beside it \(1 of 3 images lack one\)"):
        load_pairs(images)


def test_datasets_and_parquet(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = {"image": [str(folder / row["image"]) for row in rows()], "text": CAPTIONS}
    data = datasets.Dataset.from_dict(data, features=features)
    data.save_to_disk(folder / "saved")
    check(load_pairs(folder / "saved", image_size=32))
    data.to_parquet(folder / "p.parquet")
    check(load_pairs(folder / "p.parquet", image_size=32))
    datasets.Dataset.from_list(rows()).to_parquet(folder / "paths.parquet")
    check(load_pairs(folder / "paths.parquet", image_size=32))


def test_tfds(folder):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "text": tfds.features.Text()})

    class TinyPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, caption in enumerate(CAPTIONS):
                yield i, {"image": np.asarray(picture(i)), "text": caption}

    builder = TinyPairs(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    check(load_pairs(f"tfds:{builder.data_dir}", image_size=32))
    with pytest.raises(FileNotFoundError, match=r"cannot open split 'test'.*array_record"):
        load_pairs(f"tfds:{builder.data_dir}", split="test")
    with pytest.raises(FileNotFoundError, match="tfds:no_such_data"):
        load_pairs("tfds:no_such_data")


def test_shapes():
    pairs = load_pairs("shapes:train", image_size=32, shapes={"size": 7, "seed": 1, "caption_noise": 0.1})
    assert len(pairs) == 7 and pairs[0]["image"].shape == (32, 32, 3)
    assert len(load_pairs("shapes:held_out")) == 20_000


def test_random_crops_and_mirroring_come_from_the_generator(folder):
    path = write(folder / "p.json", rows())
    pairs = load_pairs(path, image_size=32, crop="random", flip=True)
    items = [pairs.fetch(0, np.random.default_rng(seed))["image"] for seed in range(40)]
    assert np.array_equal(items[3], pairs.fetch(0, np.random.default_rng(3))["image"])
    # Each item is a window of the picture, or of its mirror image; all kinds come up.
    array = np.asarray(picture(0), np.float32) / 255
    windows = [array[:, left : left + 32] for left in range(17)]
    windows += [window[:, ::-1] for window in windows]
    found = {next(i for i, window in enumerate(windows) if np.allclose(item, window, atol=1e-6)) for item in items}
    assert any(i < 17 for i in found) and any(i >= 17 for i in found) and len(found) > 10
    check(pairs)  # indexing alone stays at the center


def test_sizes_and_corners_say_where_a_picture_comes_from(folder):
    """The original size, and the corner in the resized picture or, of a mirrored one, in its mirror image."""
    pairs = load_pairs(write(folder / "p.json", rows()), image_size=32, crop="random", flip=True)
    array = np.asarray(picture(0), np.float32) / 255
    both, seen = (array, array[:, ::-1]), set()
    for seed in range(20):
        item = pairs.fetch(0, np.random.default_rng(seed))
        assert item["original_size"].tolist() == list(array.shape[:2]) == [32, 48]
        top, left = item["crop_top_left"]
        assert top == 0
        windows = [image[:, left : left + 32] for image in both]
        seen.add(next(i for i, window in enumerate(windows) if np.allclose(item["image"], window, atol=1e-6)))
    assert seen == {0, 1}
    halved = load_pairs(write(folder / "p.json", rows()), image_size=16)[0]
    assert (halved["original_size"].tolist(), halved["crop_top_left"].tolist()) == ([32, 48], [0, 4])
    shape = load_pairs("shapes:train", image_size=32)[0]
    assert (shape["original_size"].tolist(), shape["crop_top_left"].tolist()) == ([32, 32], [0, 0])


def test_resizing_is_antialiased_bicubic(folder):
    """Against torch's own antialiased bicubic kernel; 1.5 levels allow for PIL's 8-bit arithmetic."""
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    ours, _, _ = images.fit_and_locate(Image.fromarray(array), 16)
    x = torch.from_numpy(array).permute(2, 0, 1)[None].float()
    x = torch.nn.functional.interpolate(x, (16, 20), mode="bicubic", antialias=True, align_corners=False)
    theirs = x[0].permute(1, 2, 0).numpy()[:, 2:18].clip(0, 255) / 255
    assert np.abs(ours - theirs).max() <= 1.5 / 255


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "webp", "rotated"])
def test_kinds_of_pictures(tmp_path, mode):
    """Transparent becomes white, 16-bit grey is scaled, EXIF turns are followed."""
    if mode == "RGBA":
        image, expected = Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255)
    elif mode == "LA":
        image, expected = Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)
    elif mode == "I;16":
        image, expected = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), (128, 128, 128)
    elif mode == "rotated":
        image, expected = Image.new("RGB", (8, 16), (9, 9, 9)), (9, 9, 9)
    else:
        image = Image.new("RGB", (8, 8), "white").convert("RGB" if mode == "webp" else mode)
        expected = (255, 255, 255)
    buffer = io.BytesIO()
    exif = Image.Exif()
    if mode == "rotated":
        exif[0x0112] = 6
    image.save(
        buffer, {"CMYK": "TIFF", "webp": "WEBP"}.get(mode, "PNG"), **({"exif": exif} if mode == "rotated" else {})
    )
    opened = images.open_image(buffer.getvalue(), "row 1")
    assert opened.mode == "RGB"
    assert opened.size == ((16, 8) if mode == "rotated" else (8, 8))
    assert opened.getpixel((3, 3)) == expected


def test_missing_pictures_are_told_when_loading(folder):
    path = write(folder / "p.json", [*rows(), {"image": "images/4.png", "text": "x"}])
    with pytest.raises(FileNotFoundError, match=r"p\.json, row 4: .*4\.png: no such image; did you mean '[012]\.png'"):
        load_pairs(path)
    path = write(folder / "p.json", [{"image": None, "text": "x"}])
    with pytest.raises(DataError, match=r"p\.json, row 1: expected an image or the path of one; got None"):
        load_pairs(path)[0]


def test_broken_pictures_are_told_with_row_and_file(folder, monkeypatch):
    path = write(folder / "p.json", rows())
    file = folder / "images" / "1.png"
    whole = file.read_bytes()
    pairs = load_pairs(path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"p\.json, row 2: .*1\.png: the image is broken or cut short"):
        pairs[1]
    file.write_bytes(b"hello")
    with pytest.raises(DataError, match=r"p\.json, row 2: .*1\.png: not a readable image"):
        pairs[1]
    file.write_bytes(whole)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match=r"p\.json, row 2: .*1\.png: 48 x 32 pixels are too many"):
        pairs[1]


def test_a_decompression_bomb_is_told(folder):
    """A PNG header that claims 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    (folder / "images" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(DataError, match=r"row 1: .*0\.png: the image is too large"):
        load_pairs(write(folder / "p.json", rows()))[0]


def test_mistakes_in_rows_are_told(folder):
    empty = [dict(row, text="") if i == 1 else row for i, row in enumerate(rows())]
    with pytest.raises(DataError, match=r"p\.json, row 2: the caption in column 'text' is empty"):
        load_pairs(write(folder / "p.json", empty))
    with pytest.raises(
        DataError, match=r"none of the columns image.*there are pic, text: say which with image_column="
    ):
        load_pairs(write(folder / "p.json", [{"pic": "a.png", "text": "x"}]))
    with pytest.raises(DataError, match=r"no pairs in it; expected images \(PNG"):
        (folder / "empty").mkdir()
        load_pairs(folder / "empty")
    with pytest.raises(ValueError, match="crop must be one of center, random; got 'left'"):
        load_pairs("shapes:train", crop="left")
    with pytest.raises(ValueError, match="shapes options are for"):
        load_pairs(folder / "p.json", shapes={"size": 3})
