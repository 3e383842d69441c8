"""What CLIP's weights do not show: heads, activation and pixels, from the files beside them or published sizes."""

import json
import re

import numpy as np
import pytest

from imagereward_jax.rewards import preprocess
from imagereward_jax.rewards.clip_checkpoint import Base, read_clip
from imagereward_jax.weights.files import WeightsError, write_safetensors

# As in open_clip's model_configs: width, layers and heads of the vision tower, then of the text tower.
PUBLISHED = {
    "ViT-B-32": ((768, 12, 12), (512, 12, 8)),
    "ViT-B-16-plus": ((896, 12, 14), (640, 12, 10)),
    "ViT-L-14": ((1024, 24, 16), (768, 12, 12)),
    "ViT-H-14": ((1280, 32, 16), (1024, 24, 16)),
    "ViT-g-14": ((1408, 40, 16), (1024, 24, 16)),
    "ViT-bigG-14": ((1664, 48, 16), (1280, 32, 20)),
}


def write_clip(path, vision=(160, 2), text=(128, 2), **more):
    """The tensors of a CLIP that sizes are read off, in one byte each, in the layout of OpenAI and OpenCLIP."""
    shapes = {
        "visual.conv1.weight": (vision[0], 3, 14, 14),
        "visual.positional_embedding": (5, vision[0]),
        "visual.proj": (vision[0], 24),
        "positional_embedding": (16, text[0]),
        "token_embedding.weight": (50, text[0]),
    }
    for prefix, (width, layers) in (("visual.", vision), ("", text)):
        shapes |= {f"{prefix}transformer.resblocks.{i}.mlp.c_fc.weight": (4, width) for i in range(layers)}
    write_safetensors(path, {key: np.zeros(shape, np.int8) for key, shape in shapes.items()} | more)
    return path


def open_clip_config(*, vision_cfg=(), text_cfg=(), preprocess_cfg=(), **model):
    """An open_clip_config.json of `write_clip`'s sizes, with changes by section."""
    vision = {"width": 160, "layers": 2, "head_width": 80, "patch_size": 14, "image_size": 28} | dict(vision_cfg)
    text = {"width": 128, "layers": 2, "heads": 4, "context_length": 16, "vocab_size": 50} | dict(text_cfg)
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **model}
    return {"model_cfg": model, "preprocess_cfg": preprocess_cfg}


def settings_of(clip):
    vision, text = clip.config.vision, clip.config.text
    return vision.num_attention_heads, text.num_attention_heads, vision.hidden_act, text.hidden_act


def test_an_absent_shard_of_a_clip_is_named(tmp_path):
    index = {"weight_map": {"visual_projection.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=re.escape("model-00001-of-00002.safetensors: this file is named in")):
        read_clip(tmp_path, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_heads_of_published_sizes_are_known(name, tmp_path):
    """For a score whose base is known; for any CLIP the activation still has to be said, but where all that are
    published have the same."""
    (width, layers, heads), (text_width, text_layers, text_heads) = PUBLISHED[name]
    path = write_clip(tmp_path / "x.safetensors", (width, layers), (text_width, text_layers))
    assert settings_of(read_clip(path, tmp_path, Base(width, "gelu"))) == (heads, text_heads, "gelu", "gelu")
    if name in ("ViT-B-16-plus", "ViT-g-14"):
        assert settings_of(read_clip(path, tmp_path)) == (heads, text_heads, "gelu", "gelu")
        return
    for base in (None, Base(512, "gelu")):
        message = r"x\.safetensors: weights do not show its activation .* open_clip_config.json beside it"
        with pytest.raises(WeightsError, match=message):
            read_clip(path, tmp_path, base)


@pytest.mark.parametrize("sizes", [{}, {"vision": (1280, 32), "text": (768, 24)}], ids=str)
def test_heads_of_other_sizes_are_not_guessed(sizes, tmp_path):
    path = write_clip(tmp_path / "x.safetensors", **sizes)
    with pytest.raises(WeightsError, match="weights do not show how wide its attention heads are"):
        read_clip(path, tmp_path, Base(1280, "gelu"))


def test_an_open_clip_config_is_followed(tmp_path):
    """Its heads, its activation and the statistics of its pixels (LAION's L/14 has 0.5), in a folder of the hub or as a
    file of open_clip's model_configs. OpenAI's archive shows what it is, whatever lies beside it."""
    path, beside = write_clip(tmp_path / "open_clip_model.safetensors"), tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps(open_clip_config(preprocess_cfg={"mean": [0.5] * 3, "std": [0.25] * 3})))
    clip = read_clip(tmp_path, tmp_path)
    assert settings_of(clip) == (2, 4, "gelu", "gelu") and clip.statistics == ((0.5,) * 3, (0.25,) * 3)
    beside.write_text(json.dumps(open_clip_config(quick_gelu=True)["model_cfg"]))
    clip = read_clip(path, tmp_path, Base(1280, "gelu"))
    assert settings_of(clip) == (2, 4, "quick_gelu", "quick_gelu") and clip.statistics == preprocess.CLIP_STATISTICS
    write_clip(path, (128, 2), input_resolution=np.array(28))
    assert settings_of(read_clip(path, tmp_path)) == (2, 2, "quick_gelu", "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_cfg": {"width": 1280}}, r"vision_cfg states width and layers \(1280, 2\), .* have \(160, 2\)"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg: pool_type='avg' is not implemented"),
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "timm_model_name='vit_base' is not implemented"),
        ({"vision_cfg": {"head_width": 0}}, "head_width=0 should be a whole number"),
        ({"vision_cfg": {"head_width": 50}}, "num_attention_heads=3 must divide"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg: no_causal_mask=True is not implemented"),
        (
            {"text_cfg": {"hf_tokenizer_name": "google/mt5-base"}},
            "hf_tokenizer_name=.* is not implemented",
        ),
        ({"text_cfg": {"heads": "4"}}, "num_attention_heads='4' should be a whole number"),
        ({"preprocess_cfg": {"resize_mode": "squash"}}, "resize_mode='squash' is not implemented, only 'shortest'"),
        ({"preprocess_cfg": {"mean": 0.5}}, "mean=0.5 should be three numbers"),
        ({"preprocess_cfg": [1]}, r"preprocess_cfg=\[1\] should be an object"),
    ],
    ids=str,
)
def test_an_open_clip_config_that_cannot_be_followed_is_refused(changes, message, tmp_path):
    write_clip(tmp_path / "open_clip_model.safetensors")
    settings = open_clip_config(**changes)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=message):
        read_clip(tmp_path, tmp_path)


def test_a_folder_of_transformers_states_its_pixels(tmp_path):
    """preprocessor_config.json, and the older name of a tower's settings, which transformers prefers."""
    write_safetensors(tmp_path / "model.safetensors", {"visual_projection.weight": np.zeros((24, 32), np.float32)})
    sizes = {"hidden_size": 32, "num_attention_heads": 8}
    config = {"text_config": sizes, "vision_config": sizes, "vision_config_dict": sizes | {"num_attention_heads": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_clip(tmp_path, tmp_path).statistics == preprocess.CLIP_STATISTICS
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        clip = read_clip(path, tmp_path)
        assert settings_of(clip)[:2] == (4, 8) and clip.statistics == ((0.5,) * 3, (0.25,) * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels | {"resample": 2}))
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json: resample=2 is not implemented, only 3"):
        read_clip(tmp_path, tmp_path)


@pytest.mark.parametrize("kind", [preprocess.CROP, preprocess.RGB_CROP, preprocess.PAD], ids=["crop", "rgb", "pad"])
def test_pixels_are_normalised_by_the_statistics(kind):
    """On the host and on the device: the pixels of mean 0 and deviation 1, less the mean and over the deviation."""
    image, mean, std = np.random.default_rng(0).random((8, 8, 3), np.float32), (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)
    plain, other = kind.normalised_by(((0,) * 3, (1,) * 3)), kind.normalised_by((mean, std))
    for pixels in (lambda kind: kind.host(image, 8, "x"), lambda kind: kind.device(image[None], 8)[0]):
        np.testing.assert_allclose(pixels(other), (np.asarray(pixels(plain)) - mean) / std, atol=1e-6)
