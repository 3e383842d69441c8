"""Preprocessing of images against Pillow's float resize and PyTorch's antialiased one, and what is refused."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagereward_jax.rewards import preprocess

SHAPES = [(32, 32), (96, 64), (61, 97), (20, 200), (5, 3), (33, 32)]


def random_image(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).random((height, width, channels), np.float32)


def normalised(image):
    return (image - np.array(preprocess.CLIP_MEAN)) / np.array(preprocess.CLIP_STD)


def pillow_float(image, size):
    """Resize and crop of a float image, one channel at a time, by Pillow's own float filter."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    assert abs(shape[0] - width * scale) <= 1 and abs(shape[1] - height * scale) <= 1
    channels = [np.asarray(Image.fromarray(image[..., c]).resize(shape, Image.BICUBIC)) for c in range(3)]
    resized = np.stack(channels, -1)
    top, left = round((resized.shape[0] - size) / 2), round((resized.shape[1] - size) / 2)
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", SHAPES)
def test_device_pixels_are_pillows_float_bicubic(shape):
    """Within 2e-5 of Pillow in float mode: smaller, larger, odd and long images."""
    image = random_image(*shape)
    expected = normalised(pillow_float(image, 32))
    np.testing.assert_allclose(preprocess.device_pixels(image[None], 32)[0], expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_host_pixels_are_within_rounding_of_device_pixels(shape):
    """The host path rounds to 8 bits after each of its two passes and clips; smooth images show only the rounding."""
    coarse = Image.fromarray((255 * (0.2 + 0.6 * random_image(3, 3))).astype(np.uint8))
    image = np.asarray(coarse.resize(shape[::-1], Image.BILINEAR))
    host = preprocess.host_pixels(image, 32)
    device = preprocess.device_pixels(image[None].astype(np.float32) / 255, 32)[0]
    assert host.shape == (32, 32, 3) and host.dtype == np.float32
    assert np.abs((host - device) * np.array(preprocess.CLIP_STD)).max() < 1.5 / 255


def test_gradient_of_the_resize_is_pytorchs():
    torch = pytest.importorskip("torch")
    image, weight = random_image(50, 71), random_image(32, 32, seed=1)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].requires_grad_()
    resized = torch.nn.functional.interpolate(tensor, (32, 45), mode="bicubic", antialias=True)[..., 6:38]
    (resized * torch.from_numpy(weight.transpose(2, 0, 1).copy())).sum().backward()
    scaled = weight * np.float32(preprocess.CLIP_STD)
    gradient = jax.grad(lambda x: (preprocess.device_pixels(x[None], 32)[0] * scaled).sum())(jnp.asarray(image))
    np.testing.assert_allclose(gradient, tensor.grad[0].numpy().transpose(1, 2, 0), atol=1e-5)


def test_an_image_of_the_right_size_is_only_normalised():
    image = (random_image(32, 32) * 255).astype(np.uint8)
    np.testing.assert_allclose(preprocess.host_pixels(image, 32), normalised(image / 255), atol=1e-6)


def test_the_originals_resize_happens_in_the_images_own_mode():
    """Transparent pixels do not bleed their hidden colour; a palette is not mixed into new colours."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, ::2] = (255, 0, 0, 255)  # opaque red
    rgba[:, 1::2] = (0, 255, 0, 0)  # invisible green
    seen = preprocess.host_pixels(rgba, 32, rule="original") * np.array(preprocess.CLIP_STD) + np.array(
        preprocess.CLIP_MEAN
    )
    assert seen[4:-4, 4:-4, 1].max() < 0.02 < 0.9 < seen[4:-4, 4:-4, 0].min()
    palette = Image.fromarray((random_image(64, 64) * 255).astype(np.uint8)).quantize(4)
    colours = {tuple(colour) for colour in np.asarray(palette.convert("RGB")).reshape(-1, 3)}
    seen = preprocess.host_pixels(palette, 32, rule="original") * np.array(preprocess.CLIP_STD) + np.array(
        preprocess.CLIP_MEAN
    )
    assert {tuple(colour) for colour in np.rint(seen * 255).astype(np.uint8).reshape(-1, 3)} <= colours


def test_all_ways_to_pass_an_image_agree(tmp_path):
    image = (random_image(40, 50) * 255).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    expected = preprocess.host_pixels(image, 32)
    for other in (path, str(path), Image.fromarray(image), image / 255, jnp.asarray(image / 255.0)):
        np.testing.assert_array_equal(preprocess.host_pixels(other, 32), expected)
    grey = image[..., 0]
    np.testing.assert_array_equal(preprocess.host_pixels(grey, 32), preprocess.host_pixels(grey[..., None], 32))


def test_lists_and_batches_are_told_from_single_images(tmp_path):
    image = random_image(8, 8)
    assert preprocess.as_image_list(image)[1] is True
    assert preprocess.as_image_list([image])[1] is False
    listed, single = preprocess.as_image_list(np.stack([image, image]))
    assert len(listed) == 2 and not single


def huge_png(path, side):
    """A PNG header that claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_bad_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray((random_image(64, 64) * 255).astype(np.uint8)).save(whole)
    cut, text, bomb, empty = (tmp_path / name for name in ("cut.png", "text.png", "bomb.png", "empty.png"))
    cut.write_bytes(whole.read_bytes()[:3000])
    text.write_text("not an image")
    huge_png(bomb, 40_000)
    empty.write_bytes(b"")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for path, reason in (
        (cut, "broken or cut short"),
        (text, "not a readable image"),
        (bomb, "too large .at most 89,478,485 pixels"),
        (empty, "not a readable image"),
        (folder, "cannot be read .Is a directory"),
        (tmp_path / "gone.png", "no such image"),
    ):
        with pytest.raises(preprocess.ImageError, match=f"{path.name}: .*{reason}"):
            preprocess.host_pixels(path, 32)
    with pytest.raises(FileNotFoundError, match=r"gone.png: no such image"):
        preprocess.as_image_list([str(whole), tmp_path / "gone.png"])
    with pytest.raises(preprocess.ImageError, match="is a folder"):
        preprocess.as_image_list(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 16, 16), np.uint8), r"not \[3, 16, 16\]; move the channels last"),
        (np.zeros((16, 16, 2), np.uint8), r"not \[16, 16, 2\]"),
        (np.zeros((16, 16, 3), np.int32), "not int32"),
        (np.full((16, 16, 3), 255.0), r"must lie in \[0, 1\], this one in \[255, 255\]"),
        (np.full((16, 16, 3), np.nan), r"^image 3: NaN or infinite pixel values \(768\)"),
        (np.full((16, 16, 3), np.inf, np.float16), "NaN or infinite"),
        (np.linspace(-1, 1, 48).reshape(4, 4, 3), r"map it by image / 2 \+ 0.5"),
        (np.zeros((0, 16, 3), np.uint8), "the image is empty"),
        (np.zeros((100_000, 1), np.uint8), "too long and thin"),
        (np.zeros(16, np.uint8), r"not array of shape \(16,\)"),
        (None, "not NoneType"),
        (3.5, "expected a PIL image, a path, or an array"),
        ({"path": 1}, "not dict"),
    ],
)
def test_bad_arrays_are_refused(image, message):
    with pytest.raises(preprocess.ImageError, match=message):
        preprocess.host_pixels(image, 224, "image 3")


def test_an_empty_list_is_refused():
    with pytest.raises(preprocess.ImageError, match="list of images is empty"):
        preprocess.as_image_list([])


@pytest.mark.parametrize("images", [np.zeros((4, 4, 3), np.float32), np.zeros((1, 3, 4, 4), np.float32)])
def test_device_pixels_refuse_other_shapes(images):
    with pytest.raises(preprocess.ImageError, match=r"expected images \[B, H, W, 3\]"):
        preprocess.device_pixels(images, 32)


def test_device_pixels_refuse_integers():
    with pytest.raises(preprocess.ImageError, match="divide uint8 by 255"):
        preprocess.device_pixels(np.zeros((1, 4, 4, 3), np.uint8), 32)
