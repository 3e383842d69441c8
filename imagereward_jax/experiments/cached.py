"""Image-text pairs whose latents and prompts are encoded once, into `config.data.cache`."""

import functools
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagereward_jax.data.cache import open_cache
from imagereward_jax.experiments.parts import cast_frozen, load_pairs_of, pair_batch, pair_stream, stream

ENCODED_AT_ONCE = 8


def training_pairs(config, pipeline, params):
    """Batches for the denoising loss: from `config.data.cache`, or encoded step by step where none is named."""
    return cached_pair_stream(config, pipeline, params) if config.data.cache else pair_stream(config, pipeline)


def cached_pair_stream(config, pipeline, params):
    """Batches for the denoising loss from the cache, which is filled first where rows are missing.

    The crop and the mirroring of a picture are drawn once, by `config.seed`; what the VAE's latents are drawn from is
    stored, so that they differ from epoch to epoch. `config.data.caption_dropout` of the prompts are empty.

    Raises:
        CacheError: the cache was made by other settings. DataError: as `load_pairs`.
    """
    cache = fill(config, pipeline, params)
    drop = DropPrompt(config.data.caption_dropout, cache.empty())
    return stream(config, cache, cached_batch, item_transform=drop)


def cached_batch(batch):
    """A batch of rows for `make_denoising_loss`: what encodes prompts is nested under "cond"."""
    nested = {name: array for name, array in batch.items() if not name.startswith("cond.")}
    return {**nested, "cond": {name[5:]: array for name, array in batch.items() if name.startswith("cond.")}}


class DropPrompt:
    """Replaces the encoded prompt of a share of the rows by that of the empty one."""

    def __init__(self, share, empty):
        self.share, self.empty = share, {name: np.array(array) for name, array in empty.items()}

    def __call__(self, item, rng):
        return {**item, **self.empty} if rng.random() < self.share else item


def fill(config, pipeline, params):
    """The whole `Cache` of a config, with every missing shard computed; each process computes its share."""
    pairs = load_pairs_of(config)
    cache = open_cache(config.data.cache, fingerprint(config, pipeline, params, pairs), len(pairs))
    encoders = ("vae", *pipeline.text_encoders)
    params = cast_frozen(config, pipeline, {name: params[name] for name in encoders})
    encode = jax.jit(functools.partial(_encode, pipeline))
    on_device = functools.cache(lambda: jax.device_put(params))

    def encode_rows(rows):
        pieces = [rows[start : start + ENCODED_AT_ONCE] for start in range(0, len(rows), ENCODED_AT_ONCE)]
        parts = [
            _encode_rows(pipeline, encode, on_device(), [_row(pairs, index, config.seed) for index in piece])
            for piece in pieces
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def encode_empty():
        cond = pipeline.encode_prompts(on_device(), pipeline.tokenize([""]))
        return {f"cond.{name}": np.asarray(value[0]) for name, value in cond.items()}

    cache.fill(
        encode_rows,
        encode_empty,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        wait=functools.partial(multihost_utils.sync_global_devices, "cache"),
    )
    return cache


def fingerprint(config, pipeline, params, pairs):
    """What the rows of a cache follow from: settings by config field, checksums of weights and captions."""
    data = config.data
    names = ["pairs", "pairs_image_column", "pairs_text_column", "image_size", "random_crop", "random_flip"]
    fields = {f"config.data.{name}": data[name] for name in [*names, "caption_noise"]}
    prompts = getattr(pairs, "prompts", None)  # those of the shapes world follow from the fields
    return {
        **fields,
        "config.seed": config.seed if data.random_crop or data.random_flip else None,
        "config.dtype": str(config.dtype),
        "config.model.vae_dtype": str(pipeline.vae_dtype),
        "captions": None if prompts is None else zlib.crc32("\0".join(prompts).encode()),
        "empty prompt": str(pipeline.index_fields()),
        **{f"weights of {name}": _checksum(params[name]) for name in ("vae", *pipeline.text_encoders)},
    }


def _checksum(tree):
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
    return checksum


def _row(pairs, index, seed):
    """A pair with its own crop and mirroring, whoever computes it and in whatever order."""
    return pairs.fetch(index, np.random.default_rng((seed, index))) if hasattr(pairs, "fetch") else pairs[index]


def _encode(pipeline, params, images, ids):
    mean, logvar = pipeline.encode_moments(params, images)
    cond = pipeline.encode_prompts(params, ids)
    return {"latent_mean": mean, "latent_logvar": logvar, **{f"cond.{name}": value for name, value in cond.items()}}


def _encode_rows(pipeline, encode, params, rows):
    """The cache's arrays of some pairs, padded to one shape so that it is compiled once."""
    filled = rows + [rows[-1]] * (ENCODED_AT_ONCE - len(rows))
    batch = {name: [row[name] for row in filled] for name in rows[0]}
    inputs = pair_batch(
        pipeline, {name: value if name == "prompt" else np.stack(value) for name, value in batch.items()}
    )
    encoded = {**jax.device_get(encode(params, inputs.pop("image"), inputs.pop("input_ids"))), **inputs}
    return {name: array[: len(rows)] for name, array in encoded.items()}
