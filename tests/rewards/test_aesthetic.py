"""The aesthetic score as ddpo-pytorch, AlignProp and TRL preprocess for it: PyTorch's numbers, the published head."""

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch_blip
from PIL import Image

import imagereward_jax
from imagereward_jax.rewards import preprocess

HEAD = Path(__file__).parents[3] / "shared" / "real" / "sac+logos+ava1-l14-linearMSE.pth"
needs_head = pytest.mark.skipif(not HEAD.exists(), reason="needs the published head beside the checkout, shared/real")
ALIGNPROP = {"Aesthetic-AlignProp": False, "Aesthetic-AlignProp-TRL": True}  # whether resizing is antialiased


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(model, folder): a small CLIP of transformers whose embeddings have the 768 numbers that the head reads."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
    )
    config.projection_dim = 768
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def images():
    """Three images as float32 [B, 64, 64, 3] in [0, 1], of which the 8-bit levels are not all that is used."""
    coarse = np.random.default_rng(1).random((3, 3, 9, 9)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (64, 64), mode="bicubic")
    return smooth.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def head():
    layers = torch_blip.Head(768, (1024, 128, 64, 16))
    layers.load_state_dict(torch.load(HEAD, map_location="cpu", weights_only=True))
    return layers.eval()


def score_of(model, pixels):
    """ddpo-pytorch's and AlignProp's scorer, of preprocessed pixels [B, 3, 28, 28]."""
    embeds = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return head()(embeds / torch.linalg.vector_norm(embeds, dim=-1, keepdim=True))[:, 0]


def alignprop_pixels(images, antialias):
    """torchvision's Resize and Normalize of tensors: `interpolate`, with or without antialiasing."""
    mean, std = (torch.tensor(each)[:, None, None] for each in preprocess.CLIP_STATISTICS)
    options = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    return (torch.nn.functional.interpolate(images, (28, 28), **options) - mean) / std


@needs_head
def test_ddpos_aesthetic_score_is_that_of_clips_processor(clip, images):
    """As ddpo-pytorch: rounded to 8 bits, transformers' processor, no gradient; also of an image that is not square."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, folder = clip
    reward = imagereward_jax.load_score("Aesthetic", path=folder, head=HEAD, device="cpu")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for batch in (images, images[:, :, :48]):
        rounded = [Image.fromarray(image) for image in np.round(255 * batch).astype(np.uint8)]
        with torch.no_grad():
            expected = score_of(model, processor(images=rounded, return_tensors="pt")["pixel_values"]).numpy()
        assert np.ptp(expected) > 0.02
        np.testing.assert_allclose(reward.score("anything", rounded), expected, atol=1e-4)


@needs_head
@pytest.mark.parametrize("name", ALIGNPROP)
def test_alignprops_aesthetic_score_and_gradient_are_pytorchs(clip, images, name):
    """Within 1e-4, and of the gradient 1e-4 of its largest number; `score` rounds images to 8 bits first."""
    model, folder = clip
    reward = imagereward_jax.load_score(name, path=folder, head=HEAD, device="cpu")
    tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = score_of(model, alignprop_pixels(tensors, ALIGNPROP[name]))
    expected.sum().backward()
    scores, gradient = jax.value_and_grad(lambda x: reward.score_grad("anything", x).sum())(images)
    np.testing.assert_allclose(scores, expected.sum().item(), atol=1e-4)
    theirs = tensors.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gradient, theirs, atol=1e-4 * np.abs(theirs).max())
    rounded = np.round(255 * images).astype(np.uint8)
    tensors = torch.from_numpy(rounded.transpose(0, 3, 1, 2) / np.float32(255))
    with torch.no_grad():
        expected = score_of(model, alignprop_pixels(tensors, ALIGNPROP[name]))
    np.testing.assert_allclose(reward.score("anything", list(rounded)), expected, atol=1e-4)


def test_the_three_ways_to_preprocess_differ(images):
    """So each name says which is meant: not by rounding alone, of an image that shrinks."""
    ways = (preprocess.CROP, preprocess.BILINEAR, preprocess.BILINEAR_ANTIALIASED)
    images = np.round(255 * images).astype(np.uint8) / np.float32(255)
    pixels = [way.device(images, 28) for way in ways]
    host = [np.stack([way.host(image, 28) for image in images]) for way in ways[1:]]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pixels[first] - pixels[second]).max() > 0.02
    for ours, device in zip(host, pixels[1:], strict=True):
        np.testing.assert_allclose(ours, device, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("side", [512, 28, 20])
def test_bilinear_resizing_is_pytorchs(antialias, side):
    images = np.random.default_rng(0).random((1, side, side, 3), np.float32)
    theirs = alignprop_pixels(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), antialias)
    ours = preprocess.device_pixels_bilinear(images, 28, antialias=antialias)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


def test_alignprop_refuses_images_that_are_not_square():
    images = np.zeros((1, 40, 56, 3), np.float32)
    for way in (preprocess.BILINEAR, preprocess.BILINEAR_ANTIALIASED):
        with pytest.raises(ValueError, match=r"takes square images, not 56 x 40.*take the score 'Aesthetic'"):
            way.device(images, 28)
        with pytest.raises(ValueError, match="takes square images, not 56 x 40"):
            way.host(images[0], 28)
