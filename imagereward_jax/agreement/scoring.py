"""Scores evaluation data with one model, in the form that the summaries need."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imagereward_jax.agreement.sources import Generations, RankedPrompt
from imagereward_jax.bulk_scoring.stream import Item, Scorer, score_items


def score_groups(scorer: Scorer, groups: Sequence[RankedPrompt], **options: Any) -> list[list[float]]:
    """Scores every image of `RankedPrompt`s: [P] lists of floats."""
    items = [
        Item(group.prompt, image, f"prompt {group.id}, image {k + 1}")
        for group in groups
        for k, image in enumerate(group.images)
    ]
    scores = iter(score_items(scorer, items, **options))
    return [[next(scores) for _ in group.images] for group in groups]


def score_generations(scorer: Scorer, generations: Generations, **options: Any) -> dict[str, np.ndarray]:
    """Scores every image of `Generations`: {generator: float64 [P, K]}."""
    return {
        name: np.array(score_groups(scorer, _as_groups(generations, rows), **options))
        for name, rows in generations.images.items()
    }


def _as_groups(generations, rows):
    return [
        RankedPrompt(name, prompt, tuple(row), (None,) * len(row))
        for name, prompt, row in zip(generations.ids, generations.prompts, rows)
    ]


def one_image_each(
    generations: Generations, scores_of_models: dict[str, dict[str, np.ndarray]], human_order: Sequence[str]
) -> tuple[list[RankedPrompt], dict[str, list[list[float]]]]:
    """Table 1 per prompt: the generators' first images, ranked by the human order of the generators.

    Args:
        scores_of_models: {model: result of `score_generations`}.

    Returns:
        (list of `RankedPrompt`, {model: [P] lists, the mean score of each generator's images}).
    """
    ranks = tuple(range(1, len(human_order) + 1))
    groups = [
        RankedPrompt(name, prompt, tuple(generations.images[g][i][0] for g in human_order), ranks, tuple(human_order))
        for i, (name, prompt) in enumerate(zip(generations.ids, generations.prompts))
    ]
    scores = {
        model: np.stack([values[g].mean(axis=1) for g in human_order], axis=1).tolist()
        for model, values in scores_of_models.items()
    }
    return groups, scores


def count_images(data: list[RankedPrompt] | Generations) -> int:
    """Counts the images that one model scores."""
    if isinstance(data, Generations):
        return sum(len(row) for rows in data.images.values() for row in rows)
    return sum(len(group.images) for group in data)
