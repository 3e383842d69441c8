"""The cache of encoded pairs: the same loss as without, continued after a stop, refused by other settings."""

import json
import pickle

import jax
import numpy as np
import pytest
import tiny_sd1
import tiny_sdxl
from PIL import Image

pytest.importorskip("grain", reason="batches are made by grain")

from imagereward_jax.experiments.cached import cached_batch, fill, training_pairs

from imagereward_jax.config import ConfigError
from imagereward_jax.data import cache as cache_module
from imagereward_jax.data.cache import CacheError
from imagereward_jax.methods.denoising import make_denoising_loss
from imagereward_jax.recipes import default_config, validate

CAPTIONS = ["a red circle", "a blue square", "a green cross", "a big circle", "a small square"]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with tiny_sd1.quick_compilation(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_sdxl.make(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Five pictures of 24 x 40 with captions."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def config_of(pairs, cache, **changes):
    config = default_config("denoising")
    config.batch_size, config.data.pairs, config.data.cache, config.data.image_size = 2, str(pairs), str(cache), 16
    config.data.random_crop = config.data.random_flip = True
    config.update_from_flattened_dict(changes)
    return config


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_and_loss_are_those_without_a_cache(made, pairs, tmp_path):
    """Latents and embeddings within 1e-5 of encoding pair by pair; the loss of a batch within 1e-5 relative."""
    pipeline, params = made
    cache = fill(config_of(pairs, tmp_path / "c"), pipeline, params)
    shards = [f"shard_0000{i}.safetensors" for i in range(3)]
    assert files(tmp_path / "c") == ["cache.json", "empty.safetensors", *shards]
    assert len(cache) == 5 and cache[0]["time_ids"][:2].tolist() == [24, 40]
    rows = [cache[i] for i in (0, 4)]
    batch = cached_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})

    from imagereward_jax.experiments.parts import load_pairs_of

    source = load_pairs_of(config_of(pairs, tmp_path / "c"))
    items = [source.fetch(i, np.random.default_rng((0, i))) for i in (0, 4)]
    plain = {
        "image": np.stack([item["image"] for item in items]),
        "input_ids": pipeline.tokenize([CAPTIONS[0], CAPTIONS[4]]),
        "time_ids": batch["time_ids"],
    }
    expected = jax.jit(pipeline.encode_prompts)(params, plain["input_ids"])
    for name, value in expected.items():
        np.testing.assert_allclose(batch["cond"][name], value, atol=1e-5)
    loss = jax.jit(lambda params, batch: make_denoising_loss(pipeline)(params, {}, batch, jax.random.key(0))[0])
    np.testing.assert_allclose(loss(params, batch), loss(params, plain), rtol=1e-5)
    assert not any(array.any() for array in cache.empty().values()), "SDXL's empty prompt is zero"


def test_a_stopped_computation_is_continued(made, pairs, tmp_path, monkeypatch):
    """Only the missing shard is computed again, bit for bit; whole caches are not touched."""
    config = config_of(pairs, tmp_path / "c")
    fill(config, *made)
    shard = tmp_path / "c/shard_00001.safetensors"
    before, others = shard.read_bytes(), {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    shard.unlink()
    fill(config, *made)
    assert shard.read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in others.items() if path != shard)


def test_the_stream_drops_prompts(made, pairs, tmp_path):
    """All of them at 1, none at 0; batches can be continued, and sent to worker processes."""
    streams = {
        share: training_pairs(config_of(pairs, tmp_path / "c", **{"data.caption_dropout": share}), *made)
        for share in (0.0, 1.0)
    }
    kept, dropped = (next(streams[share]) for share in (0.0, 1.0))
    assert kept["cond"]["prompt_embeds"].any((1, 2)).all() and not dropped["cond"]["prompt_embeds"].any()
    np.testing.assert_array_equal(kept["latent_mean"], dropped["latent_mean"])
    cache = fill(config_of(pairs, tmp_path / "c"), *made)
    cache[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache))[3]["latent_mean"], cache[3]["latent_mean"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.image_size": 8}, "config.data.image_size: 16 there, 8 now"),
        ({"seed": 1}, "config.seed: 0 there, 1 now"),
        ({"data.random_flip": False}, "config.data.random_flip: True there, False now"),
    ],
)
def test_other_settings_are_refused(made, pairs, tmp_path, changes, message):
    fill(config_of(pairs, tmp_path / "c"), *made)
    before = files(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        fill(config_of(pairs, tmp_path / "c", **changes), *made)
    assert message in str(caught.value) and "another config.data.cache" in str(caught.value)
    assert files(tmp_path / "c") == before


def test_other_weights_and_foreign_folders_are_refused(made, pairs, tmp_path):
    pipeline, params = made
    fill(config_of(pairs, tmp_path / "c"), pipeline, params)
    changed = {**params, "vae": jax.tree.map(lambda array: array * 2, params["vae"])}
    with pytest.raises(CacheError, match="weights of vae"):
        fill(config_of(pairs, tmp_path / "c"), pipeline, changed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no cache"):
        fill(config_of(pairs, tmp_path / "other"), pipeline, params)
    with pytest.raises(ConfigError, match="train_text_encoder"):
        validate(config_of(pairs, tmp_path / "c", **{"method.train_text_encoder": True}))
