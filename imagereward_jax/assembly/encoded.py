"""Latents and prompts that are encoded once, into config.data.cache: a run that trains then holds no text encoder."""

import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from imagereward_jax.assembly.rows import nested_cond, pair_batch, rows_spec
from imagereward_jax.data.cache import Cache, open_cache
from imagereward_jax.data.prompts import PromptRows
from imagereward_jax.methods.base import Batch, Params
from imagereward_jax.terminal import say
from imagereward_jax.training.interruptions import wait_for_all
from imagereward_jax.training.progress import waiting

ENCODED_AT_ONCE = 8
PAIR_FIELDS = ("pairs", "pairs_image_column", "pairs_text_column", "image_size", "random_crop", "random_flip")
PREFERENCE_FIELDS = (
    *("preferences", "preferences_split", "images_folder", *PAIR_FIELDS[-3:]),
    *("preferences_size", "images_per_prompt"),
)
# Folders inside config.data.cache: of the encoded training prompts, and, with their checksum, of others.
PROMPTS, OTHER_PROMPTS = "prompts", "prompts_{:08x}"
CLASS = "class"  # the folder there of DreamBooth's class images


def cond_spec(pipeline: Any, rows: int) -> Batch:
    """Shapes of the conditions of `rows` prompts."""
    return jax.eval_shape(pipeline.encode_prompts, pipeline.abstract_params(), rows_spec(pipeline.tokenize([""]), rows))


def cached_batch(batch: Batch) -> Batch:
    """A batch of cached rows with the conditions nested under "cond"."""
    others = {name: array for name, array in batch.items() if not name.startswith("cond.")}
    return {**others, "cond": nested_cond(batch)}


class DropPrompt:
    """Replaces the encoded prompt of a share of the rows by the empty one's. A class, so that workers can get it."""

    def __init__(self, share: float, empty: dict[str, np.ndarray]):
        self.share, self.empty = share, {name: np.array(array) for name, array in empty.items()}

    def __call__(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**item, **self.empty} if rng.random() < self.share else item


class EncodedPrompts:
    """Prompts with their metadata and conditions, random access: as `PromptRows`, and "cond.NAME" arrays."""

    def __init__(self, rows: PromptRows, cache: Cache):
        self.rows, self.cache = rows, cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], **self.cache[index]}


def pair_cache(
    parts: Any,
    pairs: Any,
    fields: tuple[str, ...] = (*PAIR_FIELDS, "caption_noise"),
    *,
    folder: Path | None = None,
    bucket: str = "",
) -> Cache:
    """The cache of a config's pairs, or those of `folder`, with every missing shard computed; each process computes
    its share.

    A row may be of several images, [K, S, S, 3]; fields: of config.data, that the rows follow from; bucket: the size of
    all these images, whose cache is a folder by that name.

    The crop and the mirroring of an image are drawn once, by `config.seed`; latents are drawn anew each epoch from the
    stored mean and variance.

    Raises:
        CacheError: the cache was made by other settings.
    """
    seed, encoder = parts.config.seed, parts.encoder
    made_by, where = _fingerprint(parts, pairs, fields), Path(parts.config.data.cache)
    if folder is not None:
        made_by, where = made_by | {"config.data.pairs": str(folder)}, where / CLASS
    if bucket:
        made_by, where = made_by | {"size": bucket}, where / bucket
    state_of = getattr(pairs, "state_of", None)  # those of the shapes world are in no files
    cache = open_cache(where, made_by, len(pairs), state_of)

    def encode(rows: Iterable[int]) -> dict[str, np.ndarray]:
        return encoder.pairs([_row(pairs, index, seed) for index in rows])

    _fill(cache, encode, encoder)
    return cache


def prompt_cache(parts: Any, prompts: list[str], folder: str = PROMPTS) -> Cache:
    """The cache of encoded prompts in a folder of config.data.cache; as `pair_cache`."""
    encoder = parts.encoder
    made_by = {
        "config.dtype": str(parts.config.dtype),
        "prompts": _prompts_checksum(prompts),
        "empty prompt": str(parts.base_pipeline.index_fields()),
        **encoder.checksums(encoder.text),
    }
    cache = open_cache(Path(parts.config.data.cache) / folder, made_by, len(prompts))
    _fill(cache, lambda rows: encoder.prompts([prompts[index] for index in rows]), encoder)
    return cache


def prompt_reader(parts: Any, prompts: Sequence[str]) -> Callable[[Sequence[str]], Batch]:
    """A function that gives the conditions of any of `prompts`, and of the empty one, from a cache of their own."""
    known = sorted({"", *prompts})
    cache = prompt_cache(parts, known, OTHER_PROMPTS.format(_prompts_checksum(known)))
    rows = {prompt: nested_cond(cache[index]) for index, prompt in enumerate(known)}
    return lambda some: jax.tree.map(lambda *arrays: np.stack(arrays), *(rows[prompt] for prompt in some))


def _prompts_checksum(prompts):
    return zlib.crc32("\0".join(prompts).encode("utf-8", "surrogatepass"))


def _fill(cache, encode, encoder):
    """Computes the rows that are missing, a few at once by `encode`, behind a bar; Ctrl-C leaves whole shards."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    missing, main = cache.count_missing(**process), jax.process_index() == 0
    if main and missing:
        say(f"{cache.folder}: encoding {missing:,} rows of {len(cache):,}", file=sys.stderr)
    bar = tqdm(total=missing, unit="row", desc="encoding", disable=not main or not missing, file=sys.stderr)

    def encode_rows(rows):
        found = []
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            found.append(encode(rows[start : start + ENCODED_AT_ONCE]))
            bar.update(min(ENCODED_AT_ONCE, len(rows) - start))
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def encode_empty():
        return {name: array[0] for name, array in encoder.prompts([""]).items()}

    try:
        with bar:
            cache.fill(encode_rows, encode_empty, **process, wait=lambda: wait_for_all("filled the cache"))
    except KeyboardInterrupt as stop:
        kept = len(cache) - cache.count_missing()
        raise KeyboardInterrupt(
            f"{kept:,} rows of {len(cache):,} are in {cache.folder}; the same command encodes the others"
        ) from stop


class Encoder:
    """The encoders of a run's model on this process's first device, loaded when they are first needed.

    Attributes:
        text: names of the text encoders.
    """

    def __init__(self, parts: Any):
        self.parts, self.pipeline, self.text = parts, parts.base_pipeline, tuple(parts.base_pipeline.text_encoders)
        self._params, self._checksums = {}, {}
        self._encode_pairs = jax.jit(self._pairs)
        self._encode_prompts = jax.jit(self._prompts)

    def _pairs(self, params, images, ids):
        moments = self.pipeline.encode_moments(params, images.reshape(-1, *images.shape[-3:]))
        mean, logvar = (part.reshape(*images.shape[:-3], *part.shape[1:]) for part in moments)
        return {"latent_mean": mean, "latent_logvar": logvar, **self._prompts(params, ids)}

    def _prompts(self, params, ids):
        return {f"cond.{name}": value for name, value in self.pipeline.encode_prompts(params, ids).items()}

    def params(self, names: Sequence[str]) -> Params:
        """The weights of some of the encoders."""
        missing = tuple(name for name in names if name not in self._params)
        self._params |= jax.device_put(self.parts.load_local(missing)) if missing else {}
        return {name: self._params[name] for name in names}

    def checksums(self, names: Sequence[str]) -> dict[str, int]:
        """Checksums of the float32 weights of components, one in memory at a time."""
        for name in names:
            if name not in self._checksums:
                with waiting(f"checksum of {name}", main=jax.process_index() == 0):
                    self._checksums[name] = _checksum(self.parts.original(name))
        return {f"weights of {name}": self._checksums[name] for name in names}

    def pairs(self, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The cache's arrays of pairs, at most ENCODED_AT_ONCE."""

        def encode(some):
            batch = {name: [row[name] for row in some] for name in some[0]}
            stacked = {name: value if name == "prompt" else np.stack(value) for name, value in batch.items()}
            inputs = pair_batch(self.pipeline, stacked)
            found = self._encode_pairs(self.params(("vae", *self.text)), inputs["image"], inputs["ids"])
            sizes = {"time_ids": inputs["time_ids"]} if "time_ids" in inputs else {}
            return {**jax.device_get(found), **sizes}

        return _padded(rows, encode)

    def prompts(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The conditions of prompts, at most ENCODED_AT_ONCE, as the cache names them."""

        def encode(some):
            return jax.device_get(self._encode_prompts(self.params(self.text), self.pipeline.tokenize(some)))

        return _padded(prompts, encode)


def _padded(rows, encode):
    """`encode` of rows that are padded to one number, so that it is compiled once."""
    padded = [*rows, *[rows[-1]] * (ENCODED_AT_ONCE - len(rows))]
    return {name: array[: len(rows)] for name, array in encode(padded).items()}


def _fingerprint(parts, pairs, names):
    """What the rows of a cache of pairs follow from: settings by config field, checksums of weights and captions."""
    data, pipeline = parts.config.data, parts.base_pipeline
    fields = {f"config.data.{name}": data[name] for name in names}
    if hasattr(pairs, "rankings"):
        fields["rankings"] = zlib.crc32(str(pairs.rankings).encode())
    prompts = getattr(pairs, "prompts", None)  # those of the shapes world follow from the fields
    return {
        **fields,
        "config.seed": parts.config.seed if data.random_crop or data.random_flip else None,
        "config.dtype": str(parts.config.dtype),
        "config.model.vae_dtype": str(pipeline.vae_dtype),
        "captions": None if prompts is None else zlib.crc32("\0".join(prompts).encode()),
        "empty prompt": str(pipeline.index_fields()),
        **parts.encoder.checksums(("vae", *parts.encoder.text)),
    }


def _checksum(tree):
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
    return checksum


def _row(pairs, index, seed):
    """A pair with its own crop and mirroring, whoever computes it and in whatever order."""
    return pairs.fetch(index, np.random.default_rng((seed, index))) if hasattr(pairs, "fetch") else pairs[index]
