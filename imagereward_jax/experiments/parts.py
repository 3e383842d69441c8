"""Parts that several experiments are built from: data streams, casts, evaluation by sampling."""

import jax
import numpy as np

from imagereward_jax.data.batches import make_iterator
from imagereward_jax.data.pairs import load_pairs
from imagereward_jax.data.prompts import SHAPES_PREFIX, load_prompts
from imagereward_jax.data.shapes import fully_right
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.models.param_tree import join
from imagereward_jax.models.sharding import batch_over
from imagereward_jax.pipelines import load_pipeline
from imagereward_jax.pipelines.base import make_time_ids
from imagereward_jax.rewards import registry
from imagereward_jax.rewards.mixed import MixedReward, Term, apply_terms
from imagereward_jax.rewards.rules import is_rule
from imagereward_jax.storage.contact_sheet import contact_sheet, to_uint8
from imagereward_jax.training.config import ConfigError
from imagereward_jax.training.loop import Evaluation
from imagereward_jax.training.mesh import put_whole, replicated


def open_pipeline(config):
    """(pipeline, params) of `config.model`."""
    model = config.model
    return load_pipeline(
        model.path,
        variant=model.variant,
        prediction_type=model.prediction_type,
        dtype=config.dtype,
        vae_dtype=model.vae_dtype,
        remat=model.remat,
    )


def open_reward(config):
    """The reward of `config.reward`: the one at its path, or the mixture of its terms.

    Raises:
        ConfigError: it cannot be differentiated, which all that calls this needs.
    """
    settings = config.reward
    if not settings.terms:
        return _open_differentiable(settings, "config.reward", config.dtype)
    terms = {}
    for name, term in settings.terms.items():
        reward = _open_differentiable(term, f"config.reward.terms.{name}", config.dtype)
        terms[name] = Term(reward, weight=term.weight, mean=term.mean, std=term.std, clip=term.clip)
    return MixedReward(terms)


def _open_differentiable(settings, where, dtype):
    if is_rule(settings.path):
        raise ConfigError(
            f"{where}.path={settings.path!r} is computed by rule and has no gradient: it is for policy-gradient "
            "methods; take a reward that is a network, e.g. 'ImageReward-v1.0' or 'PickScore'"
        )
    return registry.open_reward(settings.path, weights=settings.weights, tokenizer=settings.tokenizer, dtype=dtype)


def stream(config, source, transform, item_transform=None):
    """The run's batches of `source`: this process's share, shuffled by the run's seed, endless, resumable.

    Args:
        transform: a stacked batch -> nested dict of numpy arrays.
        item_transform: (item, rng) -> item, where the item is read.
    """
    batches = make_iterator(
        source,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        num_workers=config.data.workers,
        item_transform=item_transform,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Stream(batches, transform)


class Stream:
    """Batches with a transform that runs in this process, so that it may hold a tokenizer that workers can't be
    sent."""

    def __init__(self, batches, transform):
        self.batches, self.transform = batches, transform

    def __next__(self):
        return self.transform(next(self.batches))

    def get_state(self):
        """Where the next batch starts."""
        return self.batches.get_state()

    def set_state(self, state):
        """Continues where `get_state` was called."""
        self.batches.set_state(state)


def cast_host(tree, dtype):
    """Floating-point numpy arrays of `tree` in `dtype`, on the host."""

    def convert(array):
        array = np.asarray(array)
        return (
            array.astype(dtype) if np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16" else array
        )

    return jax.tree.map(convert, tree)


def cast_frozen(config, pipeline, frozen):
    """The frozen networks on the host in the compute dtype; the VAE in its own, the reward as it was opened: its norms
    and head stay float32."""

    def convert(name, part):
        if name == "reward":
            return jax.tree.map(np.asarray, part)
        return cast_host(part, pipeline.vae_dtype if name == "vae" else config.dtype)

    return {name: convert(name, part) for name, part in frozen.items()}


def load_pairs_of(config):
    """The image-text pairs that `config.data` names."""
    data = config.data
    return load_pairs(
        data.pairs,
        image_column=data.pairs_image_column,
        text_column=data.pairs_text_column,
        image_size=data.image_size,
        crop="random" if data.random_crop else "center",
        flip=data.random_flip,
        shapes={"caption_noise": data.caption_noise} if str(data.pairs).startswith(SHAPES_PREFIX) else None,
    )


def pair_stream(config, pipeline):
    """Batches for the denoising loss; `config.data.caption_dropout` of the captions are empty, for guidance."""

    def drop_caption(item, rng):
        return {**item, "prompt": ""} if rng.random() < config.data.caption_dropout else item

    return stream(config, load_pairs_of(config), lambda batch: pair_batch(pipeline, batch), item_transform=drop_caption)


def pair_batch(pipeline, batch):
    """A batch of pairs for `make_denoising_loss`."""
    inputs = {"image": batch["image"], "input_ids": pipeline.tokenize(batch["prompt"])}
    if pipeline.micro_conditioned:
        size = np.full_like(batch["original_size"], batch["image"].shape[1])
        inputs["time_ids"] = make_time_ids(batch["original_size"], batch["crop_top_left"], size)
    return inputs


class SampleEvaluation:
    """Samples the held-out prompts from the same noise every time and scores the pictures.

    Args:
        config: the run's config; reads `config.eval`.
        pipeline: what samples. reward: scores the pictures, or None.
        size: (height, width) in pixels.
        mesh: batches are sharded over it.

    Calling it with (trainable, frozen) gives an `Evaluation` with `eval/reward_mean`, `eval/reward_std` (over
    prompts, of each prompt's mean), of a mixture `eval/reward_NAME` (each term's mean score), and, where the prompts
    are the shapes world's, `eval/checker_rate`, the share of pictures in which the rule-based checker finds all four
    words.
    """

    def __init__(self, config, pipeline, reward, size, mesh):
        self.config, self.pipeline, self.reward, self.mesh = config.eval, pipeline, reward, mesh
        distinct = list(load_prompts(config.eval.prompts))[: config.eval.num_prompts]
        self.prompts = [prompt for prompt in distinct for _ in range(config.eval.images_per_prompt)]
        self.check = str(config.eval.prompts).startswith("shapes:")
        self.latent_shape = pipeline.latent_shape(*size)
        self.sampler = make_sampler(config.eval.sampler, pipeline.scheduler_config, config.eval.num_steps)
        self.batch = -(-config.eval.batch_size // mesh.size) * mesh.size
        self._sample = jax.jit(self._sample_batch, out_shardings=replicated(mesh))

    def _sample_batch(self, params, batch):
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(self.config.seed), index))(batch["index"])
        with batch_over(self.mesh):
            images = self.pipeline.sample(
                params,
                batch["input_ids"],
                batch["negative_ids"] if self.config.guidance_scale > 1.0 else None,
                jax.vmap(lambda key: jax.random.normal(key, self.latent_shape))(keys),
                sampler=self.sampler,
                guidance_scale=self.config.guidance_scale,
                key=keys,
            )
        scores = apply_terms(self.reward, params["reward"], images, batch["reward"]) if self.reward else None
        return images, scores

    def __call__(self, trainable, frozen):
        params = join(frozen, trainable)
        images, scores = [], []
        for start in range(0, len(self.prompts), self.batch):
            chosen = [min(i, len(self.prompts) - 1) for i in range(start, start + self.batch)]
            prompts = [self.prompts[i] for i in chosen]
            batch = {
                "index": np.asarray(chosen, np.int32),
                "input_ids": self.pipeline.tokenize(prompts),
                "negative_ids": self.pipeline.tokenize([""] * len(prompts)),
                "reward": self.reward.tokenize(prompts) if self.reward else {},
            }
            batch_images, batch_scores = jax.device_get(self._sample(params, put_whole(self.mesh, batch)))
            images.append(batch_images)
            scores.append(batch_scores)
        images = np.concatenate(images)[: len(self.prompts)]
        metrics, captions = {}, list(self.prompts)
        if self.reward:
            rewards, terms = jax.tree.map(lambda *rows: np.concatenate(rows)[: len(self.prompts)], *scores)
            metrics |= {f"eval/reward_{name}": values.mean() for name, values in terms.items()}
            per_prompt = rewards.reshape(-1, self.config.images_per_prompt).mean(1)
            metrics |= {"eval/reward_mean": per_prompt.mean(), "eval/reward_std": per_prompt.std()}
            captions = [f"{reward:+.2f} {prompt}" for prompt, reward in zip(self.prompts, rewards)]
        if self.check:
            right = [fully_right(prompt, image) for prompt, image in zip(self.prompts, to_uint8(images))]
            metrics["eval/checker_rate"] = np.mean(right)
            captions = [f"{caption} {'(right)' if ok else '(wrong)'}" for caption, ok in zip(captions, right)]
        shown = self.config.grid
        return Evaluation(
            {name: float(value) for name, value in metrics.items()}, contact_sheet(images[:shown], captions[:shown])
        )
