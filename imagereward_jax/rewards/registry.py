"""Opens every reward by the name or path from a config or command."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.checkpoint import available_models, is_repository, load, unknown_model
from imagereward_jax.rewards.functions import as_reward, is_function_name, open_function
from imagereward_jax.rewards.remote import RemoteReward, is_url
from imagereward_jax.rewards.rules import RULES, RuleReward
from imagereward_jax.rewards.scores import SCORES, load_score


def available_rewards() -> list[str]:
    """Returns the names that `open_reward` knows, beside paths, URLs, module:function and jax:module:function."""
    return [*available_models(), *SCORES, *RULES]


def check_name(name: str, also: Sequence[str] = ()) -> None:
    """Checks that `open_reward` knows a name, before any file is read.

    Args:
        also: further known names.

    Raises:
        FileNotFoundError: not a known name, rule or path (`hub.ModelNotFound`); the message suggests the nearest name.
    """
    known = [*available_rewards(), *also]
    there = os.path.exists(os.path.expanduser(name))
    if not (name in known or is_function_name(name) or is_url(name) or there or is_repository(name)):
        raise unknown_model(str(name), known)


def open_reward(
    reward: str | os.PathLike | Callable[..., Any] | Reward | RuleReward,
    *,
    weights: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    **options: Any,
) -> Reward | RuleReward:
    """Opens a reward by name, or makes one of a function.

    Args:
        reward: a name as for `load`; one of `available_scores()`; "jpeg-compressibility" or "jpeg-incompressibility";
            "module:function", a Python function; "jax:module:function", a jax function that can be differentiated
            (`functions.PythonReward` and `JaxReward` say which arguments they take); "http://host:port", a server
            (`remote.RemoteReward`); or a Python function itself. A reward is returned as it is.
        weights: path of the weights of one of `available_scores()`.
        tokenizer: path of the vocabulary; by default the one beside the weights.
        **options: device, dtype, batch_size, image_rule, as for `load`.

    Returns:
        A `base.Reward` or a `rules.RuleReward`.

    Raises:
        FileNotFoundError, ValueError: as `load` and `load_score`; a function that takes other arguments.
    """
    if not isinstance(reward, str | os.PathLike):
        return as_reward(reward)
    name = reward
    check_name(name)
    if name in SCORES:
        return load_score(name, path=weights or None, tokenizer=tokenizer, **options)
    if weights:
        raise ValueError(f"weights={str(weights)!r} applies only to {', '.join(SCORES)}; the reward is {name!r}")
    if name in RULES or is_function_name(name) or is_url(name):
        rule = _open_rule(str(name), options.get("batch_size", RuleReward.batch_size))
        if "image_rule" in options:
            rule.image_rule = options["image_rule"]
        return rule
    return load(name, tokenizer=tokenizer, **options)


def _open_rule(name, batch_size):
    if name in RULES:
        return RULES[name]()
    if not is_url(name):
        return open_function(name)
    reward = RemoteReward(name, batch_size=batch_size)
    reward.check()
    return reward
