"""Opens the rewards of a config, with their weights or as shapes, and the scorer that trains."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.assembly.random_init import init_scorer
from imagereward_jax.config import ConfigError
from imagereward_jax.models.blip_config import ImageRewardConfig
from imagereward_jax.rewards import registry
from imagereward_jax.rewards.base import cast_params
from imagereward_jax.rewards.checkpoint import config_of, load
from imagereward_jax.rewards.functions import is_function_name
from imagereward_jax.rewards.imagereward import abstract_module, make_apply
from imagereward_jax.rewards.mixed import MixedReward, Term, Terms
from imagereward_jax.rewards.remote import RemoteReward, is_url
from imagereward_jax.rewards.rules import RULES
from imagereward_jax.rewards.scores import SCORES, imagereward_from_blip
from imagereward_jax.sections.parts import check_curve
from imagereward_jax.weights import mapping


class AbstractImageReward:
    """An ImageReward without weights or vocabulary: shapes of its parameters, tokens of the right shape.

    Args:
        config: its sizes. dtype: of its arithmetic.
    """

    differentiable = True

    def __init__(self, config: ImageRewardConfig, dtype: str):
        self.config = config
        params = mapping.params_of(abstract_module(config))
        self.params = jax.eval_shape(lambda params: cast_params(params, jnp.dtype(dtype)), params)
        self.apply = make_apply(config, dtype)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the network reads."""
        return self.config.vision.image_size

    def tokenize(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Zeros of the shapes that the real tokens have."""
        ids = np.zeros((len(prompts), self.config.max_prompt_tokens), np.int32)
        return {"input_ids": ids, "attention_mask": ids}


class TrainedScorer(NamedTuple):
    """The ImageReward that trains.

    Attributes:
        reward: an `ImageReward`, or an `AbstractImageReward` over shapes.
        apply: (params, images, tokens) -> scores, in the run's dtype and by its remat policy.
    """

    reward: Any
    apply: Callable[[Any, jax.Array, Any], jax.Array]

    @property
    def params(self) -> Any:
        """Its float32 parameters at the start."""
        return self.reward.params

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it reads."""
        return self.reward.image_size

    def tokenize(self, prompts: list[str]) -> Any:
        """Tokens of prompts, a dict of arrays [B, ...]."""
        return self.reward.tokenize(prompts)


def open_terms(settings: Any, dtype: str, *, needs_gradient: bool, abstract: bool = False) -> Terms:
    """The reward of `config.reward`, the one at its path or the mixture of its terms.

    Raises:
        ConfigError: it cannot be differentiated and needs to be, or is a network to be planned and not an ImageReward.
    """
    sections = {"config.reward": ("", settings)}
    if settings.terms:
        sections = {f"config.reward.terms.{name}": (name, term) for name, term in settings.terms.items()}
    return _open_sections(sections, settings.remote, dtype, needs_gradient=needs_gradient, abstract=abstract)


def open_judges(settings: Any, remote: Any, dtype: str) -> Terms | None:
    """The rewards of config.eval.judges; None without any.

    Args:
        settings: config.eval.judges. remote: config.reward.remote, for judges on servers.

    Raises:
        FileNotFoundError, ValueError: see `registry.open_reward`.
    """
    sections = {f"config.eval.judges.{name}": (name, judge) for name, judge in settings.items()}
    return _open_sections(sections, remote, dtype, needs_gradient=False, abstract=False) if sections else None


def _open_sections(sections, remote, dtype, *, needs_gradient, abstract):
    """The terms of {section of the config: (name, settings)}."""
    terms, fields = {}, {}
    for where, (name, one) in sections.items():
        reward = _open_one(one, where, remote, dtype, needs_gradient, abstract)
        scale = {part: one[part] for part in ("weight", "mean", "std", "clip") if part in one}
        terms[name], fields[name] = Term(reward, **scale), f"{where}.path={one.path!r}"
    return Terms(terms, fields)


def given_terms(reward: Any, *, needs_gradient: bool) -> Terms:
    """The terms of a reward that is handed over from Python instead of named in a config.

    Args:
        reward: a reward, a Python function (see `functions.PythonReward`), a mixture, or {name: `Term`, reward or
            function} for one.

    Raises:
        ConfigError: it is none of these, or cannot be differentiated and needs to be.
    """
    mixture = isinstance(reward, MixedReward | Mapping)
    members = reward.members if isinstance(reward, MixedReward) else reward if mixture else {"": reward}
    if not members:
        raise ConfigError("reward={}: a mixture needs at least one reward")
    terms = {}
    for name, one in members.items():
        if mixture:
            check_curve(f"reward[{name!r}]", name)
        try:
            terms[name] = one if isinstance(one, Term) else Term(one)
        except ValueError as error:
            raise ConfigError(f"{f'reward[{name!r}]' if mixture else 'reward'}: {error}") from error
    found = Terms(terms)
    if needs_gradient:
        for name, term in terms.items():
            _check_gradient(term.reward, found.fields[name], "imagereward_jax.jax_reward(function)")
    return found


def _check_gradient(reward, where, as_jax):
    if not reward.differentiable:
        raise ConfigError(
            f"{where} has no gradient: it is for policy-gradient methods and others that need none (ddpo, flow_grpo, "
            "nft, awm, dpo_online). Take a reward that is a network, e.g. 'ImageReward-v1.0' or 'PickScore', or, if it "
            f"is a function of yours written in jax, pass {as_jax}"
        )


def _open_one(settings, where, remote, dtype, needs_gradient, abstract):
    try:
        return _opened(settings, where, remote, dtype, needs_gradient, abstract)
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{where}.path: {error}") from error


def _opened(settings, where, remote, dtype, needs_gradient, abstract):
    path = settings.path
    if path in RULES or is_function_name(path) or is_url(path):
        reward = RemoteReward(path, **remote) if is_url(path) else registry.open_reward(path)
        if needs_gradient:
            function = path if is_function_name(path) else "module:function"
            _check_gradient(reward, f"{where}.path={path!r}", f"'jax:{function}'")
        if is_url(path) and not abstract:
            reward.check()
        return reward
    if not abstract:
        return registry.open_reward(path, weights=settings.weights, tokenizer=settings.tokenizer, dtype=dtype)
    if path in SCORES:
        raise ConfigError(
            f"{where}.path={path!r} cannot be planned, only ImageReward's network; pass --{where}.path=ImageReward-v1.0"
        )
    return AbstractImageReward(config_of(path), dtype)


def open_scorer(config: Any, *, abstract: bool = False) -> TrainedScorer:
    """The ImageReward that training starts from: of config.reward.path, of BLIP's weights, or random."""
    settings = config.reward
    reward = _abstract_scorer(settings) if abstract else _concrete_scorer(config)
    return TrainedScorer(reward, make_apply(reward.config, config.dtype, config.model.remat))


def _concrete_scorer(config):
    settings = config.reward
    if settings.path:
        return load(settings.path, tokenizer=settings.tokenizer)
    if settings.blip:
        return imagereward_from_blip(settings.blip, jax.random.key(config.seed), tokenizer=settings.tokenizer)
    return init_scorer(config)


def _abstract_scorer(settings):
    """BLIP's model_large.pth has the sizes of v1.0."""
    if settings.path or settings.blip:
        sizes = config_of(str(settings.path or settings.blip))
    else:
        sizes = ImageRewardConfig.from_dict(settings.architecture.to_dict(), "config.reward.architecture")
    return AbstractImageReward(sizes, "float32")
