"""The settings of published text-to-image models open; those of others are refused for what they are."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from published_configs import REFUSED, SETS, cut
from published_weights import measure, new_parts, torch_shapes
from tiny_sd3 import t5_tokenizer

from imagereward_jax.diffusion.samplers import samplers_of
from imagereward_jax.pipelines import open_pipeline, published_settings
from imagereward_jax.weights import mapping
from imagereward_jax.weights.generation import Generation


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A folder of every tokenizer."""
    clip = published_settings.tokenizer(
        "StableDiffusionPipeline", "tokenizer", "text_encoder", {"text_encoder": {"vocab_size": 49408}}, download=False
    )
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(clip, folder / name)
    t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    return folder


def write(folder, files, tokenizers):
    """A model's folder without weights."""
    shutil.copytree(tokenizers, folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", SETS)
def test_a_published_model_opens(name, tokenizers, tmp_path):
    """As shapes, which have the names and sizes of PyTorch's own networks; every sampler of its schedule is made of its
    scheduler_config.json."""
    files = cut(SETS[name])
    pipeline = open_pipeline(write(tmp_path / "model", files, tokenizers))
    assert pipeline.pipeline_class == files["model_index.json"]["_class_name"]
    assert {f"{part}/config.json" for part in pipeline.networks} == {file for file in files if "/config" in file}
    for part, network in pipeline.networks.items():
        ours = {key: leaf.torch_shape for key, leaf in mapping.torch_layout(network).items()}
        assert ours == torch_shapes(files[f"{part}/config.json"]), part
    if files["scheduler/scheduler_config.json"]["_class_name"] == "LCMScheduler":
        assert pipeline.generation == Generation("lcm", 4, 1.0)
    for sampler in samplers_of(pipeline.scheduler_config):
        size = 64 if pipeline.family == "sd3" else 128
        assert np.isfinite(pipeline.make_sampler(sampler, 5, 0.0, size, size).timesteps).all()


@pytest.mark.slow
def test_weights_of_published_sizes_load():
    """From files of PyTorch's names and shapes, float16, each network once: every number arrives, and memory holds one
    network at a time. Networks over 8 GB are held in one byte per number. A quarter of an hour on one busy core."""
    seen = {}
    for name, files in SETS.items():
        if parts := new_parts(files, seen, name):
            counts = [sum(map(math.prod, torch_shapes(files[f"{part}/config.json"]).values())) for part in parts]
            found = measure(files, parts, gigabytes=8)
            assert found["parameters"] == sum(counts), name
            assert found["peak"] < max(count * (2 if count < 4e9 else 1) for count in counts) + 2e9, name
    assert len(seen) == 18


def test_there_are_thirty_of_them():
    assert len(SETS) >= 30


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_kind_is_refused_for_what_it_is(name, tokenizers, tmp_path):
    files, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        open_pipeline(write(tmp_path / "model", cut(files), tokenizers))
