"""Opens every reward by the name or path from a config or command."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagereward_jax.rewards.base import Reward
from imagereward_jax.rewards.checkpoint import available_models, load, unknown_model
from imagereward_jax.rewards.rules import RULES, RuleReward, is_rule, open_rule
from imagereward_jax.rewards.scores import SCORES, load_score


def available_rewards() -> list[str]:
    """Returns the names that `open_reward` knows, beside paths and module:function."""
    return [*available_models(), *SCORES, *RULES]


def check_name(name: str, also: Sequence[str] = ()) -> None:
    """Checks that `open_reward` knows a name, before any file is read.

    Args:
        also: further known names.

    Raises:
        FileNotFoundError: not a known name, rule or path (`hub.ModelNotFound`); the message suggests the nearest name.
    """
    known = [*available_rewards(), *also]
    if not (name in known or is_rule(name) or Path(name).expanduser().exists()):
        raise unknown_model(str(name), known)


def open_reward(
    name: str, *, weights: str | os.PathLike | None = None, tokenizer: str | os.PathLike | None = None, **options: Any
) -> Reward | RuleReward:
    """Opens a reward by name.

    Args:
        name: as for `load`; one of `available_scores()`; "jpeg-compressibility" or "jpeg-incompressibility"; or
            "module:function", a Python function.
        weights: path of the weights of one of `available_scores()`.
        tokenizer: path of the vocabulary; by default the one beside the weights.
        **options: device, dtype, batch_size, image_rule, as for `load`.

    Returns:
        A `base.Reward` or a `rules.RuleReward`.

    Raises:
        FileNotFoundError, ValueError: as `load` and `load_score`.
    """
    check_name(name)
    if name in SCORES:
        return load_score(name, path=weights or None, tokenizer=tokenizer, **options)
    if weights:
        raise ValueError(f"weights={weights!r} applies only to {', '.join(SCORES)}; the reward is {name!r}")
    if is_rule(name):
        return open_rule(name, options.get("image_rule", "shown"))
    return load(name, tokenizer=tokenizer, **options)
