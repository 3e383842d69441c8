"""A weighted sum of several rewards, each normalised to a common scale."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagereward_jax.rewards.base import ranks_of

Scores = jax.Array | np.ndarray


class RewardError(RuntimeError):
    """A reward gave no scores; the message names it."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward of a mixture; it contributes `weight * clip((score - mean) / std)`.

    Attributes:
        reward: a `rewards.base.Reward`.
        weight: any number; negative values penalise the reward.
        mean, std: of its scores; they bring rewards to a common scale.
        clip: bound on the normalised score, without gradient beyond it; 0 for none.

    Raises:
        ValueError: std is not positive, or clip is negative.
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
        scores = {name: term.reward.apply(params[name], images, tokens[name]) for name, term in self.members.items()}
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
        fields: how errors name each, "config.reward.path='jpeg-compressibility'".
    """

    terms: Mapping[str, Term]
    fields: Mapping[str, str]

    @property
    def networks(self) -> Any | None:
        """The reward of the networks alone; None if there are none."""
        networks = {name: term for name, term in self.terms.items() if term.reward.differentiable}
        return networks[""].reward if "" in networks else MixedReward(networks) if networks else None

    @property
    def functions(self) -> dict[str, Any]:
        """The `rules.RuleReward`s by name."""
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

    def call_function(self, name: str, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Computes scores float32 [N] of one of `functions`; images: uint8 [N, H, W, 3].

        Raises:
            RewardError: it raised an error, or did not return a number per image.
        """
        try:
            scores = np.asarray(self.terms[name].reward.score_arrays(images, prompts), np.float32)
        except Exception as error:
            raise RewardError(f"{self.fields[name]}: the reward failed: {type(error).__name__}: {error}") from error
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"{self.fields[name]}: the reward returned scores of shape {scores.shape} for {len(prompts)} images; "
                "expected one number per image"
            )
        return scores

    def check_finite(self, scores: Mapping[str, np.ndarray]) -> None:
        """Refuses scores of a term that hold no finite number: RewardError, with its name."""
        for name, values in scores.items():
            if not np.isfinite(values).any():
                raise RewardError(f"{self.fields[name]}: none of {len(values)} scores is a finite number")

    def total(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Computes the rewards [N] of the scores of all terms.

        Raises:
            RewardError: the scores of a term, or the rewards, hold no finite number.
        """
        self.check_finite(scores)
        rewards = sum(term.contribution(scores[name], np) for name, term in self.terms.items())
        if not np.isfinite(rewards).any():
            raise RewardError(f"{', '.join(self.fields.values())}: no image has a finite score of every reward")
        return rewards


def apply_terms(
    reward: Any, params: dict[str, Any], images: jax.Array, tokens: dict[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes (scores [B], {term: scores [B]}) of a reward; the terms are empty unless it is a mixture."""
    if isinstance(reward, MixedReward):
        return reward.apply_terms(params, images, tokens)
    return reward.apply(params, images, tokens), {}
