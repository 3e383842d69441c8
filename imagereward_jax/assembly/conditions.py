"""Sources of batches: prompts, pairs, images and groups; and how prompts become what the denoiser is conditioned on.

Batches hold token ids, or conditions that were encoded before (config.data.cache). `prepare` makes the conditions of
both inside the compiled step, so that no loss sees token ids.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.assembly import encoded, trainable
from imagereward_jax.assembly.given import training_rows
from imagereward_jax.assembly.rows import nested_cond, pair_batch, rows_spec
from imagereward_jax.config import ConfigError
from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.buckets import BucketBatches, Size, bucket_sizes, make_buckets
from imagereward_jax.data.errors import DataError
from imagereward_jax.data.groups import Pairs, padded
from imagereward_jax.data.pairs import load_pairs
from imagereward_jax.data.preferences import load_preferences
from imagereward_jax.data.prompts import SHAPES_PREFIX
from imagereward_jax.methods.base import HOST, Batch, Key, Models, Source
from imagereward_jax.models.param_tree import join
from imagereward_jax.terminal import say
from imagereward_jax.training.explore import Explore
from imagereward_jax.training.step import compile_options

MOST_IN_A_GROUP = 9  # images that ImageRewardDB has per prompt at most (arXiv 2304.05977, section 2)


class DataSource(Source):
    """Batches of a data set: this process's share, shuffled by the run's seed, endless, resumable.

    Args:
        name: of its position in checkpoints. batches: a `BatchIterator`, or None over shapes.
        transform: a stacked batch -> batch; runs in this process, so that it may hold a tokenizer that workers can't
            be sent.
        spec: shapes of a global batch.
        images: images that a global batch stands for.
        prepare: (models, batch) -> batch, inside the compiled step.
    """

    def __init__(
        self,
        name: str,
        batches: Any,
        transform: Callable[[Batch], Batch],
        spec: Batch,
        *,
        images: int,
        prepare: Callable[[Models, Batch], Batch] = lambda models, batch: batch,
    ):
        self.name, self.images, self.prepare = name, images, prepare
        self._batches, self._transform, self._spec = batches, transform, spec

    def spec(self) -> Batch:
        """See `methods.base.Source`."""
        return self._spec

    def batches(self, models: Models | None, key: Key) -> Iterator[Batch]:
        """See `methods.base.Source`; data depends on neither argument."""
        while True:
            yield self._transform(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """See `methods.base.Source`."""
        return {self.name: self._batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See `methods.base.Source`."""
        self._batches.set_state(state[self.name])


class GroupedSource(DataSource):
    """As `DataSource`, each row `group` times in succession, the batch in `parts` parts; a group may lie in several."""

    def __init__(self, *arguments: Any, group: int, parts: int, **options: Any):
        super().__init__(*arguments, **options)
        self.group, self.parts = group, parts

    def batches(self, models: Models | None, key: Key) -> Iterator[Batch]:
        """See `methods.base.Source`."""
        for batch in super().batches(models, key):
            rows = np.repeat(np.arange(len(batch[HOST]["prompt"])), self.group)
            for part in np.split(rows, self.parts):
                yield _rows_of(batch, part)


def _rows_of(value, rows):
    """The rows of a batch: of nested dicts of arrays and lists."""
    if isinstance(value, dict):
        return {name: _rows_of(part, rows) for name, part in value.items()}
    return [value[row] for row in rows] if isinstance(value, list) else value[rows]


def with_conditions(pipeline: Any, models: Models, batch: Batch) -> Batch:
    """The batch with "cond" and "negative_cond" instead of the ids that they are encoded from, and the sizes of the
    images among the conditions."""
    batch = dict(batch)
    for ids, cond in (("ids", "cond"), ("negative_ids", "negative_cond")):
        if ids in batch:
            batch[cond] = pipeline.encode_prompts(models.policy, batch.pop(ids))
    if "time_ids" in batch:
        batch["cond"] = {**batch["cond"], "time_ids": batch.pop("time_ids")}
    return batch


def prompt_source(parts: Any, negative_prompt: str | None, size: int, *, rounds: int = 1, group: int = 1) -> DataSource:
    """See `Parts.prompts`.

    Args:
        size: rows of a global batch. rounds: batches that a step takes.
        group: rows that share a prompt, in succession, over the batches of a step.
    """
    config, pipeline, reward, cached = parts.config, parts.pipeline, parts.reward, bool(parts.config.data.get("cache"))
    kind = "cond" if cached else "ids"
    spec = {kind: encoded.cond_spec(pipeline, size) if cached else rows_spec(pipeline.tokenize([""]), size)}
    if negative_prompt is not None:
        spec[f"negative_{kind}"] = spec[kind]
    if reward is not None:
        spec["reward"] = rows_spec(reward.tokenize([""]), size)
    prepare = functools.partial(with_conditions, pipeline)
    if parts.abstract:
        return DataSource("prompts", None, dict, spec, images=size, prepare=prepare)
    prompts = rounds * size // group  # of a step
    rows, constant = training_rows(parts, config.steps * prompts), {}
    encode = pipeline.tokenize
    if negative_prompt is not None:
        encode = encoded.prompt_reader(parts, [negative_prompt]) if cached else encode
        constant = {f"negative_{kind}": encode([negative_prompt])}
    rows = encoded.EncodedPrompts(rows, encoded.prompt_cache(parts, rows.prompts)) if cached else rows

    def transform(batch):
        prompts = batch.pop("prompt")
        own = {kind: nested_cond(batch) if cached else pipeline.tokenize(prompts)}
        negative = jax.tree.map(lambda row: np.repeat(row, len(prompts), axis=0), constant)
        scored = {} if reward is None else {"reward": reward.tokenize(prompts)}
        return {**own, **negative, **scored, HOST: {"prompt": prompts, "metadata": batch["metadata"]}}

    if group == 1:
        return DataSource("prompts", iterate(config, rows, size=size), transform, spec, images=size, prepare=prepare)
    options = {"images": size, "prepare": prepare, "group": group, "parts": rounds}
    return GroupedSource("prompts", iterate(config, rows, size=prompts), transform, spec, **options)


def on_policy_source(parts: Any, negative_prompt: str | None, round_size: int, **options: Any) -> Explore:
    """See `Parts.explore`."""
    config, devices = parts.config, parts.mesh.size
    if not parts.abstract and round_size % devices:
        raise ConfigError(
            f"config.method.round_size={round_size} is not divisible by {devices} device(s); the next size that is: "
            f"{-(-round_size // devices) * devices}"
        )
    rounds, group = options.get("rounds", 1), options.get("group", 1)
    if not parts.abstract and rounds * round_size % (group * jax.process_count()):
        raise ConfigError(
            f"config.method.group_size={group}: the {rounds * round_size} samples of a step (rounds x round_size) are "
            f"not whole groups for each of {jax.process_count()} process(es); take a multiple of "
            f"{group * jax.process_count()}"
        )
    shapes = parts.pipeline.abstract_params()
    if parts.abstract and parts.adapts:
        shapes = join(shapes, trainable.initial_adapter(parts))
    if parts.reward is not None:
        shapes["reward"] = jax.eval_shape(lambda tree: tree, parts.reward.params)
    source = Explore(
        prompt_source(parts, negative_prompt, round_size, rounds=rounds, group=group),
        parts.terms,
        mesh=parts.mesh,
        shapes=shapes,
        batch_size=config.batch_size,
        keep_samples=parts.given.keep_samples,
        compiler_options=compile_options(config.optimization_level, on_policy=True),
        **options,
    )
    if parts.abstract:
        parts.assumptions.append(
            f"the figures are those of one update, of which a step makes {source.updates}; the program that samples "
            f"({rounds} round(s) of {round_size} per step) and the rewards are not counted"
        )
    return source


def pair_source(
    parts: Any, prompt: str | None = None, *, name: str = "pairs", folder: Path | None = None
) -> DataSource:
    """See `Parts.pairs`. Of the captions config.data.caption_dropout are empty, for guidance.

    Args:
        name: of the source. folder: of images that take the place of config.data.pairs.
    """
    config, pipeline = parts.config, parts.pipeline
    prepare = functools.partial(with_conditions, pipeline)
    spec = pair_spec(config, pipeline)
    sizes = sizes_of(config, pipeline) if config.data.bucket_step else []
    options = {"images": config.batch_size, "prepare": prepare}
    if parts.abstract:
        return DataSource(name, None, dict, spec, **options)
    rows = load_pairs_of(config, prompt, folder)
    if sizes:
        return DataSource(name, *_bucket_batches(parts, rows, sizes), spec, **options)
    cache = encoded.pair_cache(parts, rows, folder=folder) if config.data.get("cache") else None
    return DataSource(name, *_pair_batches(parts, rows, cache), spec, **options)


def _bucket_batches(parts, rows, sizes):
    """As `_pair_batches`, each batch of one of the sizes of config.data.bucket_step."""
    config, found, counts = parts.config, {}, {}
    try:
        buckets = make_buckets(rows, sizes)
    except DataError as error:
        raise DataError(f"config.data.bucket_step={config.data.bucket_step}: {error}") from error
    for (height, width), bucket in buckets.items():
        name = f"{width}x{height}"
        cache = encoded.pair_cache(parts, bucket, bucket=name) if config.data.get("cache") else None
        found[name], transform = _pair_batches(parts, bucket, cache, workers=0)  # else each size has so many
        counts[name] = len(bucket)
    if jax.process_index() == 0:
        listed = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
        reader = (
            f", read by threads instead of config.data.workers={config.data.workers}" if config.data.workers else ""
        )
        say(f"config.data.pairs: {len(rows):,} images, {listed} (width x height){reader}", sys.stderr)
    return BucketBatches(found, counts, config.seed), transform


def sizes_of(config: Any, pipeline: Any) -> list[Size]:
    """The sizes of config.data.bucket_step, each of which the model can make.

    Raises:
        ConfigError: it does not divide config.data.image_size, or the model cannot make one of them.
    """
    data = config.data
    if data.image_size % data.bucket_step:
        raise ConfigError(
            f"config.data.image_size={data.image_size} should be a multiple of config.data.bucket_step="
            f"{data.bucket_step}, so that squares are among the sizes"
        )
    sizes = bucket_sizes(data.image_size, data.bucket_step, data.bucket_max_ratio)
    for height, width in sizes:
        try:
            pipeline.latent_shape(height, width)
        except ValueError as error:
            raise ConfigError(f"config.data.bucket_step={data.bucket_step}: {error}") from error
    return sizes


def _pair_batches(parts, rows, cache, **options):
    """(batches of pairs, or of a cache of them, with dropped captions; the transform of a batch)."""
    config, share = parts.config, parts.config.data.caption_dropout
    if cache is None:
        batches = iterate(config, rows, functools.partial(drop_caption, share), **options)
        return batches, functools.partial(pair_batch, parts.pipeline)
    return iterate(config, cache, encoded.DropPrompt(share, cache.empty()), **options), encoded.cached_batch


def preference_source(parts: Any) -> DataSource:
    """See `Parts.preferences`. Of the captions config.data.caption_dropout are empty."""
    config, pipeline = parts.config, parts.pipeline
    data = config.data
    spec = jax.tree_util.tree_map_with_path(_of_two, pair_spec(config, pipeline))
    spec.pop("time_ids", None)  # both images are told to be whole ones of the size that is made
    options = {"images": 2 * config.batch_size, "prepare": functools.partial(with_conditions, pipeline)}
    if parts.abstract:
        return DataSource("preferences", None, dict, spec, **options)
    shapes = {"size": data.preferences_size, "images_per_prompt": data.images_per_prompt}
    rows = load_preferences(
        data.preferences,
        image_size=data.image_size,
        split=data.preferences_split,
        images=data.images_folder or None,
        crop="random" if data.random_crop else "center",
        flip=data.random_flip,
        shapes=shapes if str(data.preferences).startswith(SHAPES_PREFIX) else None,
    )
    if rows.ties and jax.process_index() == 0:
        say(f"config.data.preferences: {len(rows)} pairs; {rows.ties} of equal rank are left out", sys.stderr)
    cache = encoded.pair_cache(parts, rows, encoded.PREFERENCE_FIELDS) if data.cache else None
    return DataSource("preferences", *_pair_batches(parts, rows, cache), spec, **options)


def _of_two(path, shape):
    """The shape of what a row has twice if it is an image or its encoding."""
    twice = path[0].key in ("image", "latent_mean", "latent_logvar")
    return jax.ShapeDtypeStruct((shape.shape[0], 2, *shape.shape[1:]), shape.dtype) if twice else shape


def drop_caption(share: float, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The item, in a `share` of the calls with the empty prompt."""
    return {**item, "prompt": ""} if rng.random() < share else item


def pair_spec(config: Any, pipeline: Any) -> Batch:
    """Shapes of a global batch of pairs."""
    rows, side = config.batch_size, config.data.image_size
    sizes = {"time_ids": jax.ShapeDtypeStruct((rows, 6), jnp.float32)} if pipeline.micro_conditioned else {}
    if config.data.get("cache"):
        mean = jax.ShapeDtypeStruct((rows, *pipeline.latent_shape(side, side)), jnp.float32)
        return {"latent_mean": mean, "latent_logvar": mean, "cond": encoded.cond_spec(pipeline, rows), **sizes}
    image = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
    return {"image": image, "ids": rows_spec(pipeline.tokenize([""]), rows), **sizes}


def load_pairs_of(config: Any, prompt: str | None = None, folder: Path | None = None) -> Any:
    """The image-text pairs that `config.data` names, or the images of a folder; prompt: the caption of all of them."""
    data = config.data
    columns = {"image_column": data.pairs_image_column, "text_column": data.pairs_text_column} if folder is None else {}
    return load_pairs(
        folder or data.pairs,
        **columns,
        prompt=prompt,
        image_size=data.image_size,
        crop="random" if data.random_crop else "center",
        flip=data.random_flip,
        shapes={"caption_noise": data.caption_noise} if str(data.pairs).startswith(SHAPES_PREFIX) else None,
    )


def image_source(parts: Any) -> DataSource:
    """See `Parts.images`."""
    if parts.config.data.bucket_step:
        raise ConfigError(
            f"config.data.bucket_step={parts.config.data.bucket_step}: an autoencoder is trained and measured on "
            "squares; pass --config.data.bucket_step=0"
        )
    rows, side = parts.config.batch_size, parts.config.data.image_size
    spec = {"image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)}
    batches = None if parts.abstract else iterate(parts.config, load_pairs_of(parts.config))
    return DataSource("pairs", batches, lambda batch: {"image": batch["image"]}, spec, images=rows)


def group_source(parts: Any, *, pairs: bool) -> DataSource:
    """See `Parts.groups`. Sets config.eval.every from config.eval.per_epoch."""
    config, scorer = parts.config, parts.scorer
    if parts.abstract:
        source, largest = None, _largest_group(parts, pairs)
    else:
        groups = parts.open_groups("groups")
        source = Pairs(groups) if pairs else groups
        largest = source.largest
        if config.eval.per_epoch:
            config.eval.every = max(1, len(source) // config.batch_size // config.eval.per_epoch)
    rows, side = config.batch_size, scorer.image_size
    spec = {
        "images": jax.ShapeDtypeStruct((rows, largest, side, side, 3), jnp.float32),
        "ranking": jax.ShapeDtypeStruct((rows, largest), jnp.int32),
        "reward": rows_spec(scorer.tokenize([""]), rows),
    }

    def transform(batch):
        tokens = scorer.tokenize(batch["prompt"])
        return {"images": batch["images"], "ranking": batch["ranking"], "reward": tokens}

    batches = None if source is None else iterate(config, source, functools.partial(pad_item, largest))
    return DataSource("groups", batches, transform, spec, images=rows * largest)


def pad_item(size: int, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A group padded to the size of the largest, so that groups stack."""
    return padded(item, size)


def _largest_group(parts, pairs):
    """Images in the largest group, as far as it is known without the data."""
    source = str(parts.config.data.groups)
    if pairs:
        return 2
    if source.startswith(SHAPES_PREFIX):
        return parts.config.data.images_per_prompt
    if Path(os.path.expanduser(source)).exists():
        return parts.open_groups("groups").largest
    parts.assumptions.append(
        f"config.data.groups={source!r} is not here, so the largest of its groups is taken to be of {MOST_IN_A_GROUP} "
        "images, as in ImageRewardDB"
    )
    return MOST_IN_A_GROUP


def iterate(
    config: Any,
    rows: Any,
    item_transform: Callable | None = None,
    *,
    size: int | None = None,
    workers: int | None = None,
) -> Any:
    """This process's batches of random-access `rows`: a `BatchIterator`.

    Args:
        item_transform: (item, rng) -> item, where the item is read.
        size: rows of a global batch; None for config.batch_size. workers: None for config.data.workers.
    """
    return make_iterator(
        rows,
        batch_size=(size or config.batch_size) // jax.process_count(),
        seed=config.seed,
        num_workers=config.data.workers if workers is None else workers,
        item_transform=item_transform,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        growing=getattr(rows, "drawn", False),
    )
