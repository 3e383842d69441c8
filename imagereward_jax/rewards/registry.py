"""One door to every reward, by the name or path that a config or a command gives."""

from imagereward_jax.rewards.checkpoint import available_models, load
from imagereward_jax.rewards.rules import RULES, is_rule, open_rule
from imagereward_jax.rewards.scores import SCORES, load_score


def available_rewards():
    """Names that `open_reward` knows, beside paths and module:function."""
    return [*available_models(), *SCORES, *RULES]


def open_reward(name, *, weights=None, tokenizer=None, **options):
    """The reward called `name`.

    Args:
        name: what `load` takes; one of `available_scores()`; "jpeg-compressibility" or "jpeg-incompressibility"; or
            "module:function", a Python function.
        weights: path of the weights of one of `available_scores()`.
        tokenizer: path of the vocabulary, if not the one beside the weights.
        **options: device, dtype, batch_size, as for `load`.

    Returns:
        A `base.Reward` or a `rules.RuleReward`.

    Raises:
        FileNotFoundError, ValueError: as `load` and `load_score`.
    """
    if name in SCORES:
        return load_score(name, path=weights or None, tokenizer=tokenizer, **options)
    if weights:
        raise ValueError(f"weights={weights!r} is for {', '.join(SCORES)} alone; the reward is {name!r}")
    return open_rule(name) if is_rule(name) else load(name, tokenizer=tokenizer, **options)
