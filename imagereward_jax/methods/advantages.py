"""Advantages: rewards compared with others, of the same prompt or of the same step."""

from typing import Any

import numpy as np


class PromptAdvantages:
    """(reward - mean) / standard deviation of each prompt's newest rewards, as in ddpo-pytorch, clipped.

    A prompt's statistics are those of its buffer, which holds the present rewards already; while it has fewer than
    `min_count`, they are those of all present rewards. Standard deviations are of the population, plus 1e-6. Without
    buffers all statistics are those of the present rewards, plus 1e-8.

    Args:
        buffer: rewards that are remembered of each prompt; 0 for none.
        min_count: rewards from which on a prompt has statistics of its own.
        clip: bound on the advantages.
    """

    def __init__(self, *, buffer: int, min_count: int, clip: float):
        self.buffer, self.min_count, self.clip = buffer, min_count, clip
        self._rewards: dict[str, list[float]] = {}

    def __call__(self, prompts: list[str], rewards: np.ndarray) -> np.ndarray:
        """Advantages float32 [N]; 0 for a reward that is not finite, which counts nowhere."""
        rewards = np.asarray(rewards, np.float64)
        finite = np.isfinite(rewards)
        mean, std = _statistics(rewards[finite], 1e-6 if self.buffer else 1e-8)
        means, stds = np.full(len(rewards), mean), np.full(len(rewards), std)
        names = np.asarray(prompts)
        for prompt in dict.fromkeys(prompts) if self.buffer else ():
            rows = names == prompt
            newest = [*self._rewards.get(prompt, []), *rewards[rows & finite].tolist()][-self.buffer :]
            self._rewards[prompt] = newest
            if len(newest) >= self.min_count:
                means[rows], stds[rows] = _statistics(newest, 1e-6)
        advantages = np.where(finite, (np.where(finite, rewards, 0.0) - means) / stds, 0.0)
        return np.clip(advantages, -self.clip, self.clip).astype(np.float32)

    def get_state(self) -> dict[str, list[float]]:
        """The buffers by prompt, for JSON; later calls do not change them."""
        return dict(self._rewards)

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state`."""
        self._rewards = dict(state)


def _statistics(rewards, smallest):
    return np.mean(rewards), np.std(rewards) + smallest
