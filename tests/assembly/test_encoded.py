"""The cache of encoded pairs: the same loss as without, continued after a stop, refused by other settings."""

import json
import pickle
import signal
import types

import jax
import numpy as np
import pytest
import tiny_sdxl
from PIL import Image

pytest.importorskip("grain", reason="batches are made by grain")

from imagereward_jax.assembly import encoded
from imagereward_jax.assembly.conditions import load_pairs_of, with_conditions
from imagereward_jax.assembly.parts import Parts
from imagereward_jax.config import ConfigError
from imagereward_jax.data import cache as cache_module
from imagereward_jax.data.cache import CacheError
from imagereward_jax.methods import denoising
from imagereward_jax.methods.base import Models
from imagereward_jax.recipes import default_config, validate
from imagereward_jax.training.mesh import make_mesh
from imagereward_jax.weights.files import read_tensors

CAPTIONS = ["a red circle", "a blue square", "a green cross", "a big circle", "a small square"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "ROWS_PER_SHARD", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline, params, the folder that holds them)."""
    folder = tmp_path_factory.mktemp("model")
    pipeline, params = tiny_sdxl.make(folder / "tokenizers")
    pipeline.save(folder / "saved", params)
    return pipeline, params, folder / "saved"


def parts_of(config, made):
    config.model.path = str(made[-1])
    return Parts(config, make_mesh(1, 1, jax.devices()[:1]))


def fill(config, made):
    """The whole cache of pairs of a config."""
    return encoded.pair_cache(parts_of(config, made), load_pairs_of(config))


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
    pipeline, params, _ = made
    cache = fill(config_of(pairs, tmp_path / "c"), made)
    shards = [f"shard_0000{i}.safetensors" for i in range(3)]
    assert files(tmp_path / "c") == ["cache.json", "empty.safetensors", *shards]
    assert len(cache) == 5 and cache[0]["time_ids"][:2].tolist() == [24, 40]
    rows = [cache[i] for i in (0, 4)]
    batch = encoded.cached_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    source = load_pairs_of(config_of(pairs, tmp_path / "c"))
    items = [source.fetch(i, np.random.default_rng((0, i))) for i in (0, 4)]
    plain = {
        "image": np.stack([item["image"] for item in items]),
        "ids": pipeline.tokenize([CAPTIONS[0], CAPTIONS[4]]),
        "time_ids": batch["time_ids"],
    }
    expected = jax.jit(pipeline.encode_prompts)(params, plain["ids"])
    for name, value in expected.items():
        np.testing.assert_allclose(batch["cond"][name], value, atol=1e-5)
    loss_of = denoising.make_loss(pipeline)

    @jax.jit
    def loss(params, batch):
        models = Models(params)
        return loss_of(models, with_conditions(pipeline, models, batch), jax.random.key(0))[0]

    np.testing.assert_allclose(loss(params, batch), loss(params, plain), rtol=1e-5)
    assert not any(array.any() for array in cache.empty().values()), "SDXL's empty prompt is zero"


def test_a_stopped_computation_is_continued(made, pairs, tmp_path, monkeypatch):
    """Only the missing shard is computed again, bit for bit; whole caches are not touched."""
    config = config_of(pairs, tmp_path / "c")
    fill(config, made)
    shard = tmp_path / "c/shard_00001.safetensors"
    before, others = read_tensors(shard), {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}
    shard.unlink()
    fill(config, made)
    again = read_tensors(shard)  # safetensors writes its metadata in any order
    assert again.keys() == before.keys()
    assert all(again[name].tobytes() == before[name].tobytes() for name in before)
    assert all(path.stat().st_mtime_ns == time for path, time in others.items() if path != shard)


class CountsLetters:
    """In the place of a text encoder; Ctrl-C comes while it encodes the prompt `interrupted`."""

    text = ()

    def __init__(self, interrupted=None):
        self.interrupted, self.encoded = interrupted, []

    def checksums(self, names):
        return {}

    def prompts(self, prompts):
        if self.interrupted in prompts:
            signal.raise_signal(signal.SIGINT)
        self.encoded += prompts
        return {"cond.letters": np.array([[len(prompt)] for prompt in prompts])}


def test_ctrl_c_keeps_whole_shards(tmp_path, monkeypatch, capsys):
    """Rows and a bar are told before; after it, how many rows are kept; the next run encodes the others alone."""
    monkeypatch.setattr(encoded, "ENCODED_AT_ONCE", 1)
    prompts, config = ["a", "bb", "ccc", "dddd", "eeeee"], default_config("denoising")
    config.data.cache = str(tmp_path)

    def fill(encoder):
        pipeline = types.SimpleNamespace(index_fields=dict)
        cache = encoded.prompt_cache(
            types.SimpleNamespace(config=config, encoder=encoder, base_pipeline=pipeline), prompts
        )
        return cache, capsys.readouterr().err

    with pytest.raises(KeyboardInterrupt, match=r"^2 rows of 5 are in .*prompts; the same command encodes the others$"):
        fill(CountsLetters("dddd"))
    told = capsys.readouterr().err
    assert f"{tmp_path / 'prompts'}: encoding 5 rows of 5\n" in told and "3/5" in told
    cache, told = fill(encoder := CountsLetters())
    assert encoder.encoded == ["ccc", "dddd", "eeeee", ""]
    assert "encoding 3 rows of 5\n" in told and "3/3" in told
    assert [cache[row]["cond.letters"].item() for row in range(5)] == [1, 2, 3, 4, 5]
    assert fill(CountsLetters("a"))[1] == "", "a whole cache is silent"


def test_the_stream_drops_prompts(made, pairs, tmp_path):
    """All of them at 1, none at 0; batches can be continued, and sent to worker processes."""
    kept, dropped = (
        next(
            parts_of(config_of(pairs, tmp_path / "c", **{"data.caption_dropout": share}), made).pairs().batches(None, 0)
        )
        for share in (0.0, 1.0)
    )
    assert kept["cond"]["prompt_embeds"].any((1, 2)).all() and not dropped["cond"]["prompt_embeds"].any()
    np.testing.assert_array_equal(kept["latent_mean"], dropped["latent_mean"])
    cache = fill(config_of(pairs, tmp_path / "c"), made)
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
    fill(config_of(pairs, tmp_path / "c"), made)
    before = files(tmp_path / "c")
    with pytest.raises(CacheError) as caught:
        fill(config_of(pairs, tmp_path / "c", **changes), made)
    assert message in str(caught.value) and "another config.data.cache" in str(caught.value)
    assert files(tmp_path / "c") == before


def test_other_weights_and_foreign_folders_are_refused(made, pairs, tmp_path):
    pipeline, params, _ = made
    fill(config_of(pairs, tmp_path / "c"), made)
    changed = {**params, "vae": jax.tree.map(lambda array: array * 2, params["vae"])}
    pipeline.save(tmp_path / "changed", changed)
    with pytest.raises(CacheError, match="weights of vae"):
        fill(config_of(pairs, tmp_path / "c"), (tmp_path / "changed",))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no cache"):
        fill(config_of(pairs, tmp_path / "other"), made)
    with pytest.raises(ConfigError, match="train_text_encoder"):
        validate(config_of(pairs, tmp_path / "c", **{"method.train_text_encoder": True}))


def test_prompts_are_encoded_once_too(made, tmp_path):
    """Batches from the cache have the prompts beside their conditions, within 1e-5 of encoding them in the step."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"text": caption, "rank": i} for i, caption in enumerate(CAPTIONS)]))
    config = default_config("refl")
    config.batch_size, config.data.prompts, config.data.cache = 3, str(prompts), str(tmp_path / "c")
    config.reward.path = "tiny-shapes"
    source = parts_of(config, made).prompts()
    batch = next(source.batches(None, 0))
    pipeline, params, _ = made
    expected = jax.jit(pipeline.encode_prompts)(params, pipeline.tokenize(batch["host"]["prompt"]))
    assert "ids" not in batch and batch["reward"]["input_ids"].shape[0] == 3
    assert [CAPTIONS[row["rank"]] for row in batch["host"]["metadata"]] == batch["host"]["prompt"]
    prepared = source.prepare(Models(params), {name: part for name, part in batch.items() if name != "host"})
    for name, value in expected.items():
        np.testing.assert_allclose(prepared["cond"][name], value, atol=1e-5)
    prompts.write_text(json.dumps(["other", "words"]))
    with pytest.raises(CacheError, match="prompts"):
        parts_of(config, made).prompts()
