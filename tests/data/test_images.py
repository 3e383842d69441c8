"""One reader of images: the formats it opens, one rule for odd images wherever they are read, and what folders hold."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin, features

from imagereward_jax import score
from imagereward_jax.agreement.sources import load_evaluation
from imagereward_jax.bulk_scoring.rows import read_rows
from imagereward_jax.bulk_scoring.scorers import RandomScorer, open_scorer
from imagereward_jax.bulk_scoring.stream import Item, score_chunks
from imagereward_jax.data import images, tables
from imagereward_jax.data.errors import DataError, ImageError
from imagereward_jax.data.groups import load_groups
from imagereward_jax.data.pairs import load_pairs
from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.rules import JPEGSize

SIZE = 8
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
RAMP = np.linspace(0, 255, SIZE * SIZE).round().astype(np.uint8).reshape(SIZE, SIZE)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(bits, sample_format, data):
    """A grey TIFF of SIZE x SIZE pixels in one strip."""
    tags = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: SIZE}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def twelve_bits(values):
    """Pairs of values in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


def read_everywhere(data, folder):
    """uint8 [SIZE, SIZE, 3] from each reader of an encoded image of that size, which nothing resizes."""
    path = folder / "image.png"
    path.write_bytes(data)
    row = {"prompt": "a", "generations": [str(path)] * 2, "ranking": [1, 2]}
    (folder / "groups.json").write_text(json.dumps([row]))
    (folder / "pairs.json").write_text(json.dumps([{"image": str(path), "text": "a"}]))
    normalised = [preprocess.host_pixels(path, SIZE), preprocess.host_pixels_padded(data, SIZE)]
    scored = [pixels * np.array(preprocess.CLIP_STD) + np.array(preprocess.CLIP_MEAN) for pixels in normalised]
    trained_on = load_groups(folder / "groups.json", image_size=SIZE)[0]["images"][0]
    pair = load_pairs(folder / "pairs.json", image_size=SIZE)[0]["image"]
    by_rule = JPEGSize(1).prepare(data)
    return [np.rint(pixels * 255).astype(np.uint8) for pixels in (*scored, trained_on, pair)] + [by_rule]


DEEP = {
    "PNG, 16 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "PPM, 16 bits": lambda: encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PPM"),
    "TIFF, 16 bits, big-endian": lambda: encoded(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(">u2")), "TIFF"),
    "TIFF, 12 bits": lambda: tiff(12, 1, twelve_bits(np.round(RAMP / 255 * 4095))),
    "TIFF, floating point": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_to_8_bits(kind, tmp_path):
    """The same ramp as in 8 bits, exactly, in scoring, both kinds of training data and rules; it was cut at 255."""
    for pixels in read_everywhere(DEEP[kind](), tmp_path):
        np.testing.assert_array_equal(pixels, np.repeat(RAMP[..., None], 3, axis=2), kind)


def test_arrays_of_16_bits_are_scaled_too():
    for deep in (RAMP.astype(np.uint16) * 257, RAMP.astype(np.float32) / 255):
        np.testing.assert_array_equal(np.asarray(images.open_image(deep))[..., 0], RAMP)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    return encoded(image, "PNG", exif=exif), np.rot90(RAMP, -1)


def deep_and_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", exif=exif), np.rot90(RAMP, -1)


def with_a_broken_exif():
    return encoded(Image.fromarray(RAMP), "PNG", exif=b"Exif\0\0nonsense"), RAMP


def half_transparent():
    alpha = (np.indices((SIZE, SIZE)).sum(0) % 2 * 255).astype(np.uint8)
    return encoded(Image.fromarray(np.stack([RAMP, RAMP, RAMP, alpha], -1)), "PNG"), np.where(alpha, RAMP, 255)


def transparent_colour():
    image = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    return encoded(image, "PNG", transparency=(0, 0, 0)), np.where(RAMP == 0, 255, RAMP)


def deep_transparent_colour():
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    return encoded(image, "PNG", transparency=0), np.where(RAMP == 0, 255, RAMP)


@pytest.mark.parametrize(
    "kind",
    [
        rotated,
        deep_and_rotated,
        with_a_broken_exif,
        half_transparent,
        transparent_colour,
        deep_transparent_colour,
    ],
)
def test_every_reader_takes_an_image_as_a_viewer_shows_it(kind, tmp_path):
    """Upright, and transparent parts white, in scoring, both kinds of training data and rules, exactly."""
    data, expected = kind()
    for pixels in read_everywhere(data, tmp_path):
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_the_originals_rule_is_an_option():
    """Pillow's own `convert("RGB")`: neither turned nor on white, and 16 bits cut at 255."""
    for data in (rotated()[0], half_transparent()[0], DEEP["PNG, 16 bits"]()):
        original = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(images.open_image(data, rule="original"), original)
        np.testing.assert_array_equal(images.open_square(data, SIZE, rule="original"), original)
        assert (np.asarray(images.open_image(data)) != original).any()
    with pytest.raises(ValueError, match="image_rule must be one of shown, original; got 'orignal'"):
        images.open_image(RAMP, rule="orignal")


def test_every_scorer_takes_the_rule(tiny_reward_folder, tmp_path, capsys):
    """Networks, rules, the random baseline, and the command `score`."""
    path = tmp_path / "deep.png"
    path.write_bytes(DEEP["PNG, 16 bits"]())
    for name in (str(tiny_reward_folder), "jpeg-incompressibility", "random"):
        shown, original = (open_scorer(name, image_rule=rule).prepare(path) for rule in images.IMAGE_RULES)
        assert (shown != original).any(), name
    printed = []
    for rule in images.IMAGE_RULES:
        assert score.main(["--model", "random", "--prompt", "a", "--json", "--image-rule", rule, str(path)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


@pytest.mark.parametrize("rule", images.IMAGE_RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(value, rule, tmp_path):
    pixels = RAMP.astype(np.float32) / 255
    pixels[3, 4] = value
    (tmp_path / "a.tif").write_bytes(encoded(Image.fromarray(pixels), "TIFF"))
    for image in (tmp_path / "a.tif", pixels):
        name = "t.csv, line 2: .*a.tif" if image is not pixels else "t.csv, line 2"
        with pytest.raises(ImageError, match=f"{name}: NaN or infinite pixel values \\(1\\)"):
            images.open_image(image, "t.csv, line 2", rule)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(32, 2, RAMP.astype("<i4").tobytes()), "expected pixels of 8 bits .*, not int32"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), r"must lie in \[0, 1\], this one in \[0, 255\]"),
    ],
    ids=["32-bit integers", "floating point up to 255"],
)
def test_values_of_unknown_scale_are_refused(data, message):
    """Rather than guessed: 255 might be white or nearly black."""
    with pytest.raises(ImageError, match=message):
        images.open_image(data)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """A PostScript file named .png, as a file and as bytes; Pillow by itself would hand it to Ghostscript."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **_: started.append(arguments))
    (tmp_path / "evil.png").write_bytes(EPS)
    assert Image.open(tmp_path / "evil.png").format == "EPS"
    for image in (tmp_path / "evil.png", EPS):
        for read in (images.open_image, preprocess.host_pixels_padded, JPEGSize(1).prepare):
            with pytest.raises(ImageError, match=r"not a readable image \(cut short, or none of PNG, JPEG"):
                read(image, SIZE) if read is preprocess.host_pixels_padded else read(image)
    assert not started


def test_images_in_lists_of_a_dataset_are_opened_by_the_reader_alone(tmp_path):
    """`datasets` would decode them by itself, in any format."""
    datasets = pytest.importorskip("datasets")
    column = datasets.Features({"image": datasets.List(datasets.Image()), "prompt": datasets.Value("string")})
    rows = {"image": [[{"bytes": EPS, "path": None}]], "prompt": ["a"]}
    datasets.Dataset.from_dict(rows, features=column).save_to_disk(tmp_path / "data")
    assert tables.read_table(tmp_path / "data").rows[0]["image"] == [{"bytes": EPS, "path": None}]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError, struct.error, MemoryError])
def test_whatever_a_decoder_raises_costs_that_image_alone(error, tmp_path, monkeypatch):
    """RuntimeError (AVIF) and NotImplementedError (DDS) were tracebacks that ended --on-error skip."""

    def broken(self):
        raise error("decoder")

    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP).save(tmp_path / "b.bmp")
    items = [Item("a", tmp_path / name, f"line {i}") for i, name in enumerate(("a.png", "b.bmp"))]
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    (scored,) = score_chunks(RandomScorer(), [items], workers=1, skip_errors=True)
    assert scored.scores[0] is None and scored.scores[1] is not None
    assert scored.errors[0].startswith(f"line 0: {tmp_path / 'a.png'}: the image is broken or cut short (")


KINDS = {"a.png": "PNG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.JP2": "JPEG2000", "e.apng": "PNG", "f.tif": "TIFF"}
KINDS |= {"sub/g.pgm": "PPM", "h.webp": "WEBP"} | ({"i.avif": "AVIF"} if features.check("avif") else {})


@pytest.fixture
def folder(tmp_path):
    """Images by all their suffixes, and three files that are none; one of them is hidden."""
    (tmp_path / "sub").mkdir()
    for name, kind in KINDS.items():
        Image.new("L", (SIZE, SIZE)).save(tmp_path / name, kind)
    for name in ("old.psd", "sub/notes.md", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folders_images_are_those_that_are_read_and_others_are_named(folder, capsys):
    """With one prompt for all; .jfif, .jpe, .jp2, .apng and .avif were left out in silence."""
    found = [str(item.image.relative_to(folder)) for item in read_rows(folder, prompt="a cat").items]
    assert sorted(found) == sorted(KINDS)
    message = f"warning: {folder}: {len(KINDS)} images; 2 other files are left out: old.psd, sub/notes.md\n"
    assert capsys.readouterr().err == message


def test_a_folder_of_pairs_reads_the_same_images(folder, capsys):
    """Captions are not named as left out; one without an image is."""
    for name in KINDS:
        (folder / name).with_suffix(".txt").write_text("a cat")
    (folder / "old.txt").write_text("a dog")
    pairs = load_pairs(folder, image_size=SIZE)
    assert len([pairs[i] for i in range(len(pairs))]) == len(KINDS)
    assert "3 other files are left out: old.psd, old.txt, sub/notes.md\n" in capsys.readouterr().err


def test_generators_images_may_be_of_any_format(tmp_path):
    """--images DIR/MODEL/ID_K: .png alone was found."""
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.json").write_text(json.dumps([{"id": "x_0", "prompt": "a"}, {"id": "y", "prompt": "b"}]))
    names = ["x_0_0.jpg", "x_0_1.webp", "y_0.png", "y_1.jfif"]
    for name in (*names, "grid.png", "readme.md"):
        (tmp_path / "model" / name).write_bytes(b"")
    found = load_evaluation(tmp_path / "prompts.json", tmp_path).images["model"]
    assert [path.name for row in found for path in row] == names
    (tmp_path / "model" / "y_2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"row 2: .*y_2\.png is one more than the 2 images of the first prompt"):
        load_evaluation(tmp_path / "prompts.json", tmp_path)
    (tmp_path / "model" / "y_1.gif").write_bytes(b"")
    with pytest.raises(DataError, match=r"y_1\.jfif: there is also y_1\.gif; keep one of them"):
        load_evaluation(tmp_path / "prompts.json", tmp_path)
