"""Advantages: rewards compared with others, of the same prompt, of the same group or of the same step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Scored(NamedTuple):
    """The samples of a step, of all processes, and what they scored.

    Attributes:
        prompts: N texts. rewards: float32 [N], not finite if there is no verdict.
        groups: int [N], equal for samples of one group; by default every sample is a group.
        terms: {name: (weight, contribution [N])} of the rewards, whose sum they are.
    """

    prompts: list[str]
    rewards: np.ndarray
    groups: np.ndarray | None = None
    terms: Mapping[str, tuple[float, np.ndarray]] = {}


class PromptAdvantages:
    """(reward - mean) / standard deviation of each prompt's newest rewards, as in ddpo-pytorch, clipped.

    A prompt's statistics are those of its buffer, which holds the present rewards already; while it has fewer than
    `min_count`, they are those of all present rewards. Standard deviations are of the population, plus 1e-6. Without
    buffers all statistics are those of the present rewards, plus 1e-8. With std="step" the standard deviation is always
    that of all present rewards (Flow-GRPO's `global_std`).

    Args:
        buffer: rewards that are remembered of each prompt; 0 for none.
        min_count: rewards from which on a prompt has statistics of its own.
        clip: bound on the advantages.
        std: whose standard deviation divides, the "prompt"'s or the whole "step"'s.
    """

    def __init__(self, *, buffer: int, min_count: int, clip: float, std: str = "prompt"):
        self.buffer, self.min_count, self.clip, self.std = buffer, min_count, clip, std
        self._rewards: dict[str, list[float]] = {}

    def __call__(self, scored: Scored) -> np.ndarray:
        """Advantages float32 [N]; 0 for a reward that is not finite, which counts nowhere."""
        prompts, rewards = scored.prompts, np.asarray(scored.rewards, np.float64)
        finite = np.isfinite(rewards)
        mean, std = _statistics(rewards[finite], 1e-6 if self.buffer else 1e-8)
        means, stds = np.full(len(rewards), mean), np.full(len(rewards), std)
        names = np.asarray(prompts)
        for prompt in dict.fromkeys(prompts) if self.buffer else ():
            rows = names == prompt
            newest = [*self._rewards.get(prompt, []), *rewards[rows & finite].tolist()][-self.buffer :]
            self._rewards[prompt] = newest
            if len(newest) >= self.min_count:
                means[rows], own = _statistics(newest, 1e-6)
                if self.std == "prompt":
                    stds[rows] = own
        advantages = np.where(finite, (np.where(finite, rewards, 0.0) - means) / stds, 0.0)
        return np.clip(advantages, -self.clip, self.clip).astype(np.float32)

    def get_state(self) -> dict[str, list[float]]:
        """The buffers by prompt, for JSON; later calls do not change them."""
        return dict(self._rewards)

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state`."""
        self._rewards = dict(state)


class GroupAdvantages:
    """(reward - mean of its group) / standard deviation, clipped; it remembers nothing.

    Args:
        clip: bound on the advantages.
        std: whose standard deviation divides: the "group"'s (DanceGRPO, MixGRPO) or the whole "step"'s (Flow-GRPO).
        sample: whether it is that of a sample, n - 1 (DanceGRPO), not of the population.
        epsilon: is added to it.
        combine: how several rewards are: "rewards" adds them before they are compared. "advantages" compares each
            by itself in its group and adds the advantages by their weights (MixGRPO). "gdpo" also brings that sum to
            mean 0 and standard deviation 1 over the step (arXiv 2601.05242).
    """

    def __init__(
        self,
        *,
        clip: float,
        std: str = "step",
        sample: bool = False,
        epsilon: float = 1e-4,
        combine: str = "rewards",
    ):
        self.clip, self.std, self.ddof, self.epsilon, self.combine = clip, std, int(sample), epsilon, combine

    def __call__(self, scored: Scored) -> np.ndarray:
        """Advantages float32 [N]; 0 for a reward that is not finite, which counts nowhere."""
        rewards = np.asarray(scored.rewards, np.float64)
        finite = np.isfinite(rewards)
        groups = np.arange(len(rewards)) if scored.groups is None else np.unique(scored.groups, return_inverse=True)[1]
        found = np.zeros(len(rewards))
        if self.combine == "rewards":
            found[finite] = self._compare(rewards[finite], groups[finite])
        else:
            for weight, values in scored.terms.values():  # a contribution has its weight's sign
                values = np.asarray(values, np.float64)
                found[finite] += abs(weight) * self._compare(values[finite], groups[finite])
        if self.combine == "gdpo":
            mean, std = _statistics(found[finite], self.epsilon)
            found[finite] = (found[finite] - mean) / std
        return np.clip(found, -self.clip, self.clip).astype(np.float32)

    def _compare(self, values, groups):
        count = np.bincount(groups)
        deviations = values - (np.bincount(groups, values) / np.maximum(count, 1))[groups]
        if self.std == "step":
            std = np.std(values, ddof=self.ddof)
        else:
            std = np.sqrt(np.bincount(groups, deviations**2) / np.maximum(count - self.ddof, 1))[groups]
        return deviations / (std + self.epsilon)

    def get_state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Nothing is resumed."""


def keep_extremes(rows: Any, group: int, keep: int) -> np.ndarray:
    """Which rows of whole groups have the `keep` / 2 largest and smallest advantages of their group, as indices.

    Args:
        rows: advantages [N], `group` consecutive ones of each group.

    Returns:
        [N / group * keep] indices, each group's from the smallest advantage to the largest; ties in their order.
    """
    order = np.argsort(np.asarray(rows).reshape(-1, group), axis=1, kind="stable")
    chosen = np.concatenate([order[:, : keep // 2], order[:, group - keep // 2 :]], 1)
    return (chosen + group * np.arange(len(order))[:, None]).reshape(-1)


def _statistics(rewards, smallest):
    return np.mean(rewards), np.std(rewards) + smallest
