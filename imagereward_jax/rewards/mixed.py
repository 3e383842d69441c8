"""A weighted sum of several rewards, each normalised to a common scale."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.rewards.base import ranks_of
from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.functions import JaxReward, as_reward

Scores = jax.Array | np.ndarray
NO_VERDICT = "no_verdict"  # the curve of images without a finite reward


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward of a mixture; it contributes `weight * clip((score - mean) / std)`.

    Attributes:
        reward: a `rewards.base.Reward`, a `rules.RuleReward`, or a Python function (`functions.PythonReward`).
        weight: any number; negative values penalise the reward.
        mean, std: of its scores; they bring rewards to a common scale.
        clip: bound on the normalised score, without gradient beyond it; 0 for none.

    Raises:
        ValueError: std is not positive, clip is negative, or the reward is neither a reward nor a function.
    """

    reward: Any
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    clip: float = 0.0

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std={self.std}: expected a number above 0")
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip}: expected 0 (no clipping) or more")
        object.__setattr__(self, "reward", as_reward(self.reward))

    def contribution(self, scores: Scores, numpy: ModuleType = jnp) -> Scores:
        """Computes the contribution of scores [B] to the mixture."""
        normalised = (scores - self.mean) / self.std
        return self.weight * (numpy.clip(normalised, -self.clip, self.clip) if self.clip else normalised)


class MixedReward:
    """Sum of the contributions of several rewards; has the interface of `Reward`.

    Args:
        terms: {name: `Term`}.

    Raises:
        ValueError: `terms` is empty.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        if not terms:
            raise ValueError("a mixture needs at least one reward")
        self.members = dict(terms)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the terms, by name."""
        return {name: term.reward.params for name, term in self.members.items()}

    @property
    def differentiable(self) -> bool:
        """Whether every term is differentiable."""
        return all(term.reward.differentiable for term in self.members.values())

    def tokenize(self, prompts: str | Sequence[str]) -> dict[str, Any]:
        """Tokens for each term, by name."""
        return {name: term.reward.tokenize(prompts) for name, term in self.members.items()}

    def apply_terms(
        self, params: dict[str, Any], images: jax.Array, tokens: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes (mixture [B], {name: scores [B]}); the scores of the terms are not normalised."""
        scores = {
            name: term.reward.apply(params.get(name, {}), images, tokens[name])  # trees of weights drop empty dicts
            for name, term in self.members.items()
        }
        return sum(term.contribution(scores[name]) for name, term in self.members.items()), scores

    def apply(self, params: dict[str, Any], images: jax.Array, tokens: dict[str, Any]) -> jax.Array:
        """Computes the mixture [B] float32; see `Reward.apply`."""
        return self.apply_terms(params, images, tokens)[0]

    def score(self, prompt: str | Sequence[str], image: Any) -> float | list[float]:
        """See `Reward.score`."""
        parts = [term.contribution(np.asarray(term.reward.score(prompt, image)), np) for term in self.members.values()]
        return sum(parts).tolist()

    def inference_rank(self, prompt: str, images: Any) -> tuple[list[int], list[float]]:
        """See `Reward.inference_rank`."""
        parts = [
            term.contribution(np.asarray(term.reward.inference_rank(prompt, images)[1]), np)
            for term in self.members.values()
        ]
        rewards = sum(parts).tolist()
        return ranks_of(rewards), rewards

    def score_grad(self, prompts: str | Sequence[str], images: jax.Array) -> jax.Array:
        """See `Reward.score_grad`."""
        return sum(term.contribution(term.reward.score_grad(prompts, images)) for term in self.members.values())


@dataclasses.dataclass(frozen=True)
class Terms:
    """Any reward as its terms: networks, scored inside compiled programs, and functions, scored on the host.

    Attributes:
        terms: {name: `Term`}; a reward that is no mixture is one term of the name "".
        fields: how errors name each, "config.reward.path='jpeg-compressibility'"; by default by its name.
    """

    terms: Mapping[str, Term]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        default = {name: f"reward {getattr(term.reward, 'name', name)!r}" for name, term in self.terms.items()}
        object.__setattr__(self, "fields", {**default, **self.fields})

    @property
    def networks(self) -> Any | None:
        """The reward of the networks alone; None if there are none."""
        networks = {name: term for name, term in self.terms.items() if term.reward.differentiable}
        return networks[""].reward if "" in networks else MixedReward(networks) if networks else None

    @property
    def functions(self) -> dict[str, Any]:
        """The rewards without a gradient, `rules.RuleReward`s, by name."""
        return {name: term.reward for name, term in self.terms.items() if not term.reward.differentiable}

    def apply_networks(self, params: Any, images: jax.Array, tokens: Any) -> dict[str, jax.Array]:
        """Computes {name: scores [B]} of the networks; params, tokens: those of `networks`."""
        if self.networks is None:
            return {}
        total, scores = apply_terms(self.networks, params, images, tokens)
        return scores or {"": total}

    @property
    def embedder(self) -> str | None:
        """The first term whose reward has `embed`; None if there is none."""
        return next((name for name, term in self.terms.items() if hasattr(term.reward, "embed")), None)

    def embed(self, params: Any, images: jax.Array) -> jax.Array:
        """Embeds images by the network of `embedder`: [B, D] float32, unit vectors; params: those of `networks`."""
        name = self.embedder
        return self.terms[name].reward.embed(params[name] if name else params, images)

    def call_function(
        self,
        name: str,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Scores images with one of `functions`.

        Args:
            images: uint8 [N, H, W, 3].
            metadata: the other columns of the prompts' rows.

        Returns:
            {curve: float32 [N]}: the scores as `name`, NaN for no verdict, and named scores of the function as PART, or
            as NAME.PART in a mixture.

        Raises:
            RewardError: it raised an error, or did not return a number per image.
        """
        where = self.fields[name]
        try:
            scores = self.terms[name].reward.named_scores(images, prompts, metadata)
        except RewardError as error:
            raise RewardError(where, error.reason) from error
        except Exception as error:
            raise RewardError(where, f"the reward failed: {type(error).__name__}: {error}") from error
        curves = {}
        for part, values in scores.items():
            if np.shape(values) != (len(prompts),):
                said = f"the reward returned scores of shape {np.shape(values)} for {len(prompts)} images"
                raise RewardError(where, f"{said}; expected one number per image")
            curves[f"{name}.{part}" if name and part else name or part] = np.asarray(values, np.float32)
        if reserved := sorted({"mean", "std", NO_VERDICT} & set(curves)):
            raise RewardError(where, f"scores named {', '.join(reserved)} would be logged as the reward's: rename them")
        return curves

    def join(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Joins the curves of several batches: {curve: float32 [N]}.

        Raises:
            RewardError: a function named other scores for one batch than for another.
        """
        names = [list(part) for part in parts]
        odd = {name for one in names for name in set(one) ^ set(names[0])}
        if odd:
            raise RewardError(
                ", ".join(self.fields.values()),
                f"the scores {', '.join(sorted(odd))} were returned for one batch and not for another; a function has "
                "to name the same scores every time",
            )
        return {name: np.concatenate([np.asarray(part[name], np.float32) for part in parts]) for name in names[0]}

    def check_traced(self, height: int, width: int) -> None:
        """Traces every jax function of a user over images of a size, before anything is compiled.

        Raises:
            RewardError: it cannot be traced, or does not return floating-point numbers [B].
        """
        for name, term in self.terms.items():
            if isinstance(term.reward, JaxReward):
                try:
                    term.reward.check_traced(height, width)
                except RewardError as error:
                    raise RewardError(self.fields[name], error.reason) from error

    def check_finite(self, scores: Mapping[str, np.ndarray]) -> None:
        """Refuses scores of a term that hold no finite number: RewardError, with its name."""
        for name in self.terms:
            if not np.isfinite(scores[name]).any():
                raise RewardError(self.fields[name], f"none of {len(scores[name])} scores is a finite number")

    def total(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Computes the rewards [N] of the scores of all terms, NaN if one of them has no verdict.

        Raises:
            RewardError: the scores of a term, or the rewards, hold no finite number.
        """
        self.check_finite(scores)
        rewards = sum(values for _, values in self.contributions(scores).values())
        if not np.isfinite(rewards).any():
            raise RewardError(", ".join(self.fields.values()), "no image has a finite score of every reward")
        return rewards

    def contributions(self, scores: Mapping[str, np.ndarray]) -> dict[str, tuple[float, np.ndarray]]:
        """(weight, contribution [N]) of each term to the rewards that `total` computes."""
        return {name: (term.weight, term.contribution(scores[name], np)) for name, term in self.terms.items()}

    def metrics(self, scores: Mapping[str, np.ndarray], rewards: np.ndarray) -> dict[str, float]:
        """Means of named scores, "reward_NAME", over the images with a verdict; of functions also the number of images
        without, "reward_no_verdict"."""
        found = {f"reward_{name}": mean_of(values) for name, values in scores.items() if name}
        if self.functions:
            found[f"reward_{NO_VERDICT}"] = float(np.sum(~np.isfinite(rewards)))
        return found


def mean_of(values: np.ndarray) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.mean(finite)) if len(finite) else float("nan")


def apply_terms(
    reward: Any, params: dict[str, Any], images: jax.Array, tokens: dict[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (scores [B], {term: scores [B]}) of a reward; the terms are empty unless it is a mixture."""
    if isinstance(reward, MixedReward):
        return reward.apply_terms(params, images, tokens)
    return reward.apply(params, images, tokens), {}
