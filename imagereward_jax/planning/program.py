"""The training step of a config as a program over shapes: what it takes, how that lies on a mesh, lowered for it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from imagereward_jax.data.prompts import SHAPES_PREFIX
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.experiments import ranking
from imagereward_jax.experiments.refl import make_phases
from imagereward_jax.experiments.weights import lora_alpha
from imagereward_jax.methods.denoising import make_denoising_loss
from imagereward_jax.methods.ranking import trainable_mask as trainable_scorer
from imagereward_jax.models import lora
from imagereward_jax.models.hardware import target_platform
from imagereward_jax.models.param_tree import join, split, trainable_mask
from imagereward_jax.planning.counts import bytes_on_a_device
from imagereward_jax.planning.published import (
    abstract_pipeline,
    abstract_reward,
    abstract_trained_reward,
    scorer_tokens,
)
from imagereward_jax.training.config import ConfigError
from imagereward_jax.training.mesh import batch_sharding, replicated, weight_shardings
from imagereward_jax.training.optimizer import make_optimizer
from imagereward_jax.training.step import Phase, init_state, make_train_step

METHODS = ("refl", "denoising", "ranking")
MOST_IN_A_GROUP = 9  # pictures that ImageRewardDB has for a prompt at most (arXiv 2304.05977, section 2)


@dataclasses.dataclass
class Recipe:
    """A config's phases and optimizer; the shapes of its state, of what is frozen and of a global batch a stream.

    images_per_sample: pictures that one of the batch stands for. assumptions: sentences on what a plan cannot know.
    """

    config: Any
    phases: tuple
    optimizer: Any
    state: Any
    frozen: dict
    batches: dict
    images_per_sample: int = 1
    assumptions: tuple = ()


class Traced(NamedTuple):
    """A step traced for a mesh: `jax.stages.Traced`, and the bytes on a device of each kind of its arguments."""

    traced: Any
    bytes_per_chip: dict


def abstract_recipe(config):
    """The `Recipe` of a validated config of ReFL, the denoising loss or a scorer's training.

    Raises:
        ConfigError: another method. ValueError, FileNotFoundError: see `abstract_pipeline`, `data.groups.load_groups`.
    """
    method = config.method
    if method.name not in METHODS:
        raise ConfigError(f"config.method.name={method.name!r}: only {', '.join(METHODS)} can be planned")
    return _scorer_recipe(config) if method.name == "ranking" else _diffusion_recipe(config)


def _diffusion_recipe(config):
    pipeline = abstract_pipeline(config)
    has_reward = config.reward.path or config.reward.terms
    reward = abstract_reward(config.reward, config.dtype) if has_reward else None
    networks = ("unet", *pipeline.text_encoders) if config.method.get("train_text_encoder") else ("unet",)
    trainable, frozen = _divide(config, pipeline, networks)
    frozen = {
        name: _in_dtype(part, pipeline.vae_dtype if name == "vae" else config.dtype) for name, part in frozen.items()
    }
    frozen |= {"reward": reward.params} if reward else {}
    batches = _batches(config, pipeline, reward, {**trainable, **frozen})
    return _recipe(config, _phases(config, pipeline, reward), trainable, frozen, batches)


def _scorer_recipe(config):
    scorer, params = abstract_trained_reward(config.reward)
    trainable, frozen = split({"reward": params}, {"reward": trainable_scorer(params, config.reward.fix_rate)})
    size, (pictures, assumptions) = scorer.vision.image_size, _pictures_in_a_group(config, scorer)
    groups = {
        "images": _rows(config.batch_size, (pictures, size, size, 3), jnp.float32),
        "ranking": _rows(config.batch_size, (pictures,), jnp.int32),
        "reward": scorer_tokens(scorer, config.batch_size),
    }
    recipe = _recipe(config, ranking.make_phases(config, scorer), trainable, frozen, {"groups": groups})
    return dataclasses.replace(recipe, images_per_sample=pictures, assumptions=assumptions)


def _pictures_in_a_group(config, scorer):
    """(pictures in the largest group, sentences on what is assumed)."""
    source = str(config.data.groups)
    if config.method.mode == "pairs":
        return 2, ()
    if source.startswith(SHAPES_PREFIX):
        return config.data.images_per_prompt, ()
    if Path(source).expanduser().exists():
        return ranking.open_groups(config, "groups", scorer.vision.image_size).largest, ()
    return MOST_IN_A_GROUP, (
        f"config.data.groups={source!r} is not here, so the largest of its groups is taken to be of {MOST_IN_A_GROUP} "
        "pictures, as in ImageRewardDB",
    )


def _recipe(config, phases, trainable, frozen, batches):
    optimizer = make_optimizer(config.optimizer, config.steps * len(phases), config.batch_size)

    def state(params):
        return init_state(params, optimizer, seed=config.seed, ema=config.ema_decay > 0)

    return Recipe(config, phases, optimizer, jax.eval_shape(state, trainable), frozen, batches)


def arguments_on_a_device(recipe, mesh):
    """{kind: bytes} of what each device of a mesh (or `AbstractMesh`) holds between steps, and of a batch."""
    kinds = {
        "parameters": recipe.state.params,
        "moments": recipe.state.opt_state,
        "ema": recipe.state.ema,
        "frozen": recipe.frozen,
    }
    sizes = {name: bytes_on_a_device(tree, weight_shardings(mesh, tree)) for name, tree in kinds.items()}
    rows = jax.tree.map(lambda _: batch_sharding(mesh), recipe.batches)
    return {**sizes, "batch": bytes_on_a_device(recipe.batches, rows)}


def trace(recipe, mesh, platform):
    """The whole training step, as the loop runs it, traced for a mesh of `platform` ("cpu", "gpu" or "tpu")."""
    config = recipe.config
    step = make_train_step(
        recipe.phases,
        recipe.optimizer,
        dtype=jnp.dtype(config.dtype),
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
        mesh=mesh,
    )
    shardings = weight_shardings(mesh, recipe.state)
    arguments = (
        placed(recipe.state, shardings),
        placed(recipe.frozen, weight_shardings(mesh, recipe.frozen)),
        placed(recipe.batches, jax.tree.map(lambda _: batch_sharding(mesh), recipe.batches)),
    )
    with target_platform(platform):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        return jitted.trace(*arguments)


def rollout_steps(config):
    """How often the sampler's loop, which ends at the latest of a batch's stop indices, runs at most."""
    return config.method.get("stop_max", 1)


def _divide(config, pipeline, networks):
    """(trainable, frozen) as `experiments.weights.divide` divides them."""
    params, rank = pipeline.abstract_params(), config.lora.rank
    for name in networks if rank else ():
        options = {"rank": rank, "alpha": lora_alpha(config), "dropout": config.lora.dropout}
        try:
            pipeline.add_lora(name, config.lora.targets, **options)
        except ValueError as error:
            raise ConfigError(f"config.lora (rank={rank}, targets of the {name}): {error}") from error
        network = pipeline.networks[name]
        key = jax.eval_shape(lambda: jax.random.key(0))
        added = jax.eval_shape(lambda key, network=network: lora.init(network, key, config.lora.init), key)
        params = join(params, {name: added})
    return split(params, trainable_mask(params, networks, lora=rank > 0))


def _phases(config, pipeline, reward):
    method = config.method
    if method.name == "refl":
        sampler = make_sampler(method.sampler, pipeline.scheduler_config, method.num_steps)
        return make_phases(pipeline, reward, sampler, method)
    loss = make_denoising_loss(pipeline, timestep_power=method.timestep_power, snr_gamma=method.snr_gamma)
    return (Phase("denoising", lambda params, frozen, batches, key: loss(params, frozen, batches["pairs"], key)),)


def _batches(config, pipeline, reward, params):
    """Shapes of a global batch of each stream, as the experiments' streams give them."""
    batch, method, streams = config.batch_size, config.method, {}
    ids = _rows(batch, pipeline.tokenize([""]).shape[1:], jnp.int32)
    if method.name == "refl":
        scored = scorer_tokens(reward.config, batch)
        streams["prompts"] = {"input_ids": ids, "negative_ids": ids, "reward": scored}
    if method.get("pretrain") == "off":
        return streams
    size = config.data.image_size
    pairs = {"image": _rows(batch, (size, size, 3), jnp.float32), "input_ids": ids}
    if config.data.cache:
        mean = _rows(batch, pipeline.latent_shape(size, size), jnp.float32)
        cond = jax.eval_shape(pipeline.encode_prompts, params, ids)
        pairs = {"latent_mean": mean, "latent_logvar": mean, "cond": cond}
    if pipeline.micro_conditioned:
        pairs["time_ids"] = _rows(batch, (6,), jnp.float32)
    return {**streams, "pairs": pairs}


def _rows(batch, shape, dtype):
    return jax.ShapeDtypeStruct((batch, *shape), dtype)


def _in_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), tree)


def placed(tree, shardings):
    """The shapes of `tree`, each with its sharding of a tree of the same structure."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )
