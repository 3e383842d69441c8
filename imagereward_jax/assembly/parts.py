"""The parts that a method is handed: pipeline, rewards, sources of batches, evaluators, exports.

A part is opened when the method asks for it, so that a run has what its method reads. Over shapes (`abstract`) the same
parts have settings and shapes alone.
"""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imagereward_jax.assembly import class_images, conditions, encoded, evaluators, random_init, rewards, trainable
from imagereward_jax.assembly.given import Given
from imagereward_jax.config import ConfigError
from imagereward_jax.data.groups import load_groups
from imagereward_jax.data.prompts import SHAPES_PREFIX, load_prompt_rows
from imagereward_jax.methods.base import Evaluator, Export, Method, Params, Source, find_method
from imagereward_jax.models import lora
from imagereward_jax.pipelines import families
from imagereward_jax.pipelines.base import TextToImage
from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.mixed import MixedReward, Terms
from imagereward_jax.training.mesh import weight_shardings
from imagereward_jax.training.workdir import CLASS_IMAGES


class Parts:
    """What `make(config, parts)` of a method may use.

    Attributes:
        config: the run's whole config. mesh: what its arrays are sharded over.
        abstract: whether the parts are shapes: then evaluators and exports are empty, and nothing is read.
        given: objects that take the place of what the config names.
        assumptions: sentences on what shapes alone cannot know.
        files: {name: text} for the workdir.
    """

    def __init__(self, config: Any, mesh: Mesh, *, abstract: bool = False, given: Given | None = None):
        self.config, self.mesh, self.abstract, self.given = config, mesh, abstract, given or Given()
        self.assumptions: list[str] = []
        self.files: dict[str, str] = {}

    @functools.cached_property
    def base_pipeline(self) -> TextToImage:
        """The text-to-image model of config.model, without an adapter."""
        model = self.config.model
        options = {"dtype": self.config.dtype, "vae_dtype": model.vae_dtype, "remat": model.remat}
        if model.get("from_scratch"):
            return random_init.open_pipeline(self.config, **options)
        try:
            return families.open_pipeline(
                model.path,
                variant=model.variant,
                parts=model.parts,
                prediction_type=model.prediction_type,
                download=not self.abstract,
                **options,
            )
        except families.UnknownModel as error:
            raise ConfigError(f"config.model.path={model.path!r}: {error}") from error

    @functools.cached_property
    def pipeline(self) -> TextToImage:
        """The text-to-image model, with config.lora's adapters if there are any.

        Raises:
            ConfigError: config.lora.targets matches no layer, or its rank is too large for one.
        """
        pipeline, settings = self.base_pipeline, self.config.get("lora")
        if not self.adapts:
            return pipeline
        targets = {pipeline.denoiser: settings.targets or pipeline.lora_targets}
        if self.config.method.get("train_text_encoder"):
            targets |= dict.fromkeys(pipeline.trained_encoders, lora.CLIP_ATTENTION)
        options = {"rank": settings.rank, "alpha": trainable.lora_alpha(self.config), "dropout": settings.dropout}
        for name, layers in targets.items():
            try:
                pipeline = pipeline.with_lora(name, layers, **options)
            except ValueError as error:
                raise ConfigError(f"config.lora (rank={settings.rank}, targets of the {name}): {error}") from error
        return pipeline

    @functools.cached_property
    def encoder(self) -> encoded.Encoder:
        """What fills config.data.cache; `assemble` lets go of it, and of the encoders' weights, before it loads those
        of the run."""
        return encoded.Encoder(self)

    @property
    def adapts(self) -> bool:
        """Whether low-rank parameters train, over a frozen base."""
        return "lora" in self.config and self.config.lora.rank > 0

    @functools.cached_property
    def terms(self) -> Terms | None:
        """The reward that was given or that config.reward names, networks and functions; None if there is none.

        Raises:
            ConfigError: it has no gradient and the method needs one, or it cannot be planned.
            FileNotFoundError, ValueError: see `registry.open_reward`.
        """
        settings, method = self.config.reward, find_method(self.config.method.name)
        needs_gradient = method.Config.needs_gradient
        if self.given.reward is not None:
            return rewards.given_terms(self.given.reward, needs_gradient=needs_gradient)
        if not (settings.path or settings.terms):
            return None
        return rewards.open_terms(settings, self.config.dtype, needs_gradient=needs_gradient, abstract=self.abstract)

    @functools.cached_property
    def reward(self) -> Reward | MixedReward | None:
        """The networks of the reward, which are all of it if the method needs its gradient; None if there are none."""
        return None if self.terms is None else self.terms.networks

    @functools.cached_property
    def judges(self) -> Terms | None:
        """The rewards of config.eval.judges, which score evaluations and train nothing; None without any.

        Raises:
            FileNotFoundError, ValueError: see `registry.open_reward`.
        """
        return rewards.open_judges(self.config.eval.judges, self.config.reward.remote, self.config.dtype)

    @functools.cached_property
    def scorer(self) -> rewards.TrainedScorer:
        """The ImageReward that trains."""
        return rewards.open_scorer(self.config, abstract=self.abstract)

    @property
    def generation(self) -> Any:
        """How the model is meant to be sampled: the model's own settings, changed by those of config.eval."""
        return evaluators.generation_of(self.config, self.pipeline)

    # sources of batches

    def prompts(self, negative_prompt: str | None = None) -> Source:
        """Batches of training prompts: "cond", with a negative prompt "negative_cond", and the reward's tokens."""
        return conditions.prompt_source(self, negative_prompt, self.config.batch_size)

    def explore(self, *, negative_prompt: str | None = None, round_size: int | None = None, **options: Any) -> Source:
        """Batches that the present weights make: samples of training prompts with their advantages.

        Args:
            negative_prompt: see `prompts`, whose batches `sample` is given.
            round_size: samples of one round over all devices; None for config.batch_size.
            options: sample, assign, choose, tables, copies, group, select, selected, rounds and epochs of
                `training.explore.Explore`.

        Raises:
            ConfigError: the devices do not divide a round, of which it names config.method.round_size, or the processes
                the groups of a step (config.method.group_size).
        """
        return conditions.on_policy_source(self, negative_prompt, round_size or self.config.batch_size, **options)

    def pairs(self, prompt: str | None = None) -> Source:
        """Batches of image-text pairs: "cond" and "image", or latents from config.data.cache.

        Args:
            prompt: the caption of all of them; None for their own.
        """
        return conditions.pair_source(self, prompt)

    def class_images(self, prompt: str, count: int, folder: str, *, prompts: str = "") -> Source:
        """Batches as of `pairs` of images of a class, of which the model makes what `folder` lacks before it trains.

        Args:
            prompt: of the class, the caption of every image. count: images that there should be.
            folder: "" for WORKDIR/class_images.
            prompts: where `prompt` is empty, a file of several; each image then has its own in a .txt beside it.

        Raises:
            DataError, FileExistsError: see `load_prompts` and `class_images.make_images`.
        """
        where = Path(os.path.expanduser(folder)) if folder else (self.given.workdir or Path()) / CLASS_IMAGES
        if not self.abstract:
            several = None if prompt else load_prompt_rows(prompts, flag="").prompts
            class_images.make_images(self, several or [prompt], count, where, captions=bool(several))
        return conditions.pair_source(self, prompt or None, name="class", folder=where)

    def preferences(self) -> Source:
        """Batches of pairs of images of one prompt, the preferred first: "cond" and "image" [B, 2, H, W, 3], or latents
        from config.data.cache."""
        return conditions.preference_source(self)

    def images(self) -> Source:
        """Batches of the images of pairs alone: "image"."""
        return conditions.image_source(self)

    def groups(self, *, pairs: bool = False) -> Source:
        """Batches of ranked groups, or of all their pairs: "images", "ranking", and the scorer's tokens."""
        return conditions.group_source(self, pairs=pairs)

    def open_groups(self, name: str) -> Any:
        """The ranked groups of config.data's source `name`, as the scorer reads their images."""
        data, source = self.config.data, str(self.config.data[name])
        size = self.scorer.image_size
        if source.startswith(SHAPES_PREFIX):
            shapes = {"images_per_prompt": data.images_per_prompt, "spoilt": data.spoilt, "unclear": data.unclear}
            shapes |= evaluators.TEST_SHAPES if name == "test_groups" else {}
            return load_groups(source, image_size=size, shapes=shapes)
        return load_groups(
            source,
            image_size=size,
            split=data[f"{name.removesuffix('_groups')}_split"],
            images=data.images_folder or None,
            cache=data.cache or None,
            image_rule=data.image_rule,
        )

    # evaluators

    def samples(self, height: int, width: int) -> dict[str, Evaluator]:
        """Samples held-out prompts of config.eval and scores them by the reward.

        Fills in config.eval's sampler, steps and guidance from the model, so that the run's config.json and report
        state them. Without config.eval.prompts nothing is evaluated.
        """
        if self.abstract or not self.config.eval.prompts:
            return {}
        generation, settings = self.generation, self.config.eval
        settings.sampler, settings.num_steps = generation.sampler, generation.num_inference_steps
        settings.guidance_scale = generation.guidance_scale
        return {"samples": evaluators.SampleEvaluator(self, (height, width))}

    def reconstructions(self) -> dict[str, Evaluator]:
        """Reconstructs held-out images."""
        return {} if self.abstract else {"reconstructions": evaluators.ReconstructionEvaluator(self)}

    def rankings(self) -> dict[str, Evaluator]:
        """Orders held-out groups."""
        if self.abstract:
            return {}
        held_out = self.open_groups("held_out_groups")
        count = self.config.eval.num_groups or len(held_out)
        return {"rankings": evaluators.RankingEvaluator(self.scorer, held_out, self.mesh, count)}

    def test_rankings(self) -> Any:
        """Orders the test groups; None if there are none."""
        if self.abstract or not self.config.data.test_groups:
            return None
        groups = self.open_groups("test_groups")
        evaluator = evaluators.RankingEvaluator(self.scorer, groups, self.mesh, len(groups))

        def test(components: Params) -> dict[str, float]:
            found = evaluator(components).metrics
            return {name.replace("eval/", "test/"): value for name, value in found.items()}

        return test

    # weights

    def shapes(self) -> Params:
        """Shapes of every component that was asked for, without adapters: a reward as it is held, others float32.

        Text encoders are not among them if config.data.cache holds the prompts.
        """
        found = {}
        if "base_pipeline" in self.__dict__:
            cached = self.base_pipeline.text_encoders if self.config.data.get("cache") else ()
            found = {name: tree for name, tree in self.base_pipeline.abstract_params().items() if name not in cached}
        if self.__dict__.get("terms") and self.reward is not None:
            found["reward"] = _shapes_of(self.reward.params)
        if "scorer" in self.__dict__:
            found["reward"] = _shapes_of(self.scorer.params)
        return found

    @property
    def in_memory(self) -> bool:
        """Whether the model's weights come from memory: random ones, or given ones."""
        return bool(self.config.model.get("from_scratch")) or self.given.params is not None

    @property
    def license(self) -> str | None:
        """Of the model that training starts from, as the hub calls it; None if it is not known."""
        if "base_pipeline" not in self.__dict__ or self.config.model.get("from_scratch"):
            return None
        return families.license_of(self.config.model.path)

    def component_dtype(self, name: str) -> Any:
        """The dtype that a frozen component is held in."""
        return jnp.dtype(self.pipeline.vae_dtype if name == "vae" else self.config.dtype)

    def load(self, target: Params) -> Params:
        """The weights of the components of `target`, each in its dtype and shards."""
        target = dict(target)
        loaded = {}
        if "reward" in target:
            source = self.scorer if "scorer" in self.__dict__ else self.reward
            shapes = target.pop("reward")
            loaded["reward"] = jax.device_put(source.params, weight_shardings(self.mesh, shapes))
        if not target:
            return loaded
        if self.in_memory:
            params = self.initial_params()
            return loaded | jax.tree.map(
                lambda leaf, array: jax.device_put(jnp.asarray(array, leaf.dtype), leaf.sharding),
                target,
                {name: params[name] for name in target},
            )
        return loaded | self.base_pipeline.load_params(target)

    def load_local(self, names: tuple[str, ...]) -> Params:
        """Components as NumPy arrays in the dtypes that they are held in, for this process alone."""
        shapes = self.base_pipeline.abstract_params()
        target = trainable.held(self, {name: shapes[name] for name in names}, {})
        if self.in_memory:
            params = self.initial_params()
            return jax.tree.map(
                lambda leaf, array: np.asarray(array).astype(leaf.dtype), target, {name: params[name] for name in names}
            )
        return self.base_pipeline.load_params(target)

    def original(self, name: str) -> Params:
        """One component's float32 weights as NumPy arrays."""
        if self.in_memory:
            return self.initial_params()[name]
        return self.base_pipeline.load_params({name: self.base_pipeline.abstract_params()[name]})[name]

    def initial_params(self) -> Params:
        """All weights of a model from scratch, float32, the same at every call; or those that were given."""
        if self.given.params is not None:
            return self.given.params
        return random_init.init_params(self.config, self.base_pipeline)

    # exports

    def export(self, method: Method) -> Export | None:
        """The pipeline's folder, or the adapter's file; None over shapes."""
        if self.abstract:
            return None
        return trainable.export_adapter(self) if self.adapts else trainable.export_model(self, method)

    def save_pipeline(self, folder: Any, components: Params, generation: Any = None) -> None:
        """Writes the model's folder with some components replaced."""
        if self.in_memory:
            components = {**self.initial_params(), **components}
        self.pipeline.save(folder, components, generation=generation or self.generation)

    def export_autoencoder(self, evaluate: dict[str, Evaluator]) -> Export | None:
        """The model with the new autoencoder, its latents scaled to unit variance, as diffusion models want them."""
        return None if self.abstract else evaluators.export_autoencoder(self, evaluate["reconstructions"])

    def export_scorer(self, evaluate: dict[str, Evaluator]) -> Export | None:
        """The scorer's folder; scores are standardised on held-out images to mean 0 and standard deviation 1."""
        return None if self.abstract else evaluators.export_scorer(self.scorer, evaluate["rankings"])


def _shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
