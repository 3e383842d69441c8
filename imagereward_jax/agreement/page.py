"""HTML page of results: the tables, and the prompts with the largest disagreement, with images."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagereward_jax.agreement.metrics import average_ranks, known_ranks, preference_counts
from imagereward_jax.agreement.sources import RankedPrompt
from imagereward_jax.agreement.summary import disagreement
from imagereward_jax.bulk_scoring.scorers import RANDOM
from imagereward_jax.data.groups import encoded
from imagereward_jax.data.images import open_image
from imagereward_jax.pages.page import escape, folded, image, paragraph, table, write_page

GENERATOR = "imagereward_jax.evaluate"
THUMBNAIL = 192
OPEN = 3  # prompts that are not folded


def write_results(
    path: Path,
    title: str,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    groups: Sequence[RankedPrompt],
    scores: dict[str, Sequence[Sequence[float]]],
    *,
    judges: str = "people",
    shown: int = 20,
) -> None:
    """Writes the page; it appears whole or not at all.

    Args:
        title: heading.
        tables: list of (header, rows) of text.
        notes: list of lines under the tables.
        groups: P `RankedPrompt`s; empty if the true order is unknown.
        scores: {model: [P] lists, the score of every image}.
        judges: who ranked the images: "people", or "the rules" of the shapes world.
        shown: number of prompts.
    """
    parts = [f"<h1>{escape(title)}</h1>", *(_table(*part) for part in tables)]
    parts += [paragraph(escape(note), "soft") for note in notes]
    if groups:
        parts.append(_worst_prompts(groups, scores, judges, shown))
    write_page(path, title, parts, generator=GENERATOR)


def _table(header, rows):
    return table([escape(cell) for cell in header], [[escape(name), *map(_estimate, cells)] for name, *cells in rows])


def _estimate(cell):
    """A value with its interval under it."""
    value, space, interval = escape(cell).partition(" [")
    return f'{value}<br><small class="soft">[{interval}</small>' if space else value


def worst_first(groups: Sequence[RankedPrompt], scores: dict[str, Sequence[Sequence[float]]]) -> list[int]:
    """Sorts prompt indices by disagreement between models and the ranking, largest first.

    Prompts without a pair are left out. The baseline "random" counts only if it is the only model.
    """
    judged = [rows for model, rows in scores.items() if model != RANDOM] or list(scores.values())
    wrong = disagreement(groups, judged)
    order = np.argsort(-np.where(np.isnan(wrong), -1, wrong), kind="stable")
    return [int(i) for i in order if not np.isnan(wrong[i])]


def _worst_prompts(groups, scores, judges, shown):
    order = worst_first(groups, scores)[:shown]
    head = (
        f"<h2>Where the models disagree most with {judges}: {len(order)} of {len(groups)} prompts</h2>"
        f'<p class="soft">Best image by {judges} first. Beside each model\'s score is the place that it gives the '
        "image, marked &#9888; if the model puts it on the wrong side of more than half of the others.</p>"
    )
    prompts = [_prompt(groups[i], {model: rows[i] for model, rows in scores.items()}, judges) for i in order]
    sections = [f"<section><h3>{name}</h3>{content}</section>" for name, content in prompts[:OPEN]]
    return head + "".join(sections + [folded(name, content) for name, content in prompts[OPEN:]])


def _prompt(group, scores, judges):
    """(the prompt, what is under it), HTML."""
    ranks = known_ranks(group.ranks)
    agreement = []
    for model, row in scores.items():
        right, pairs = preference_counts(ranks, row)
        agreement.append(f"{model} orders {right} of {pairs} pairs as {judges} did")
    figures = "".join(_figure(group, k, ranks, scores, judges) for k in np.argsort(ranks, kind="stable"))
    told = paragraph(escape(f"{group.id}: {', '.join(agreement)}"), "small soft")
    return escape(group.prompt), f'{told}<div class="row">{figures}</div>'


def _figure(group, k, ranks, scores, judges):
    rank = "not ranked" if np.isnan(ranks[k]) else f"by {judges}: {ranks[k]:g}."
    name = f"{group.labels[k]}, {rank}" if group.labels else rank
    lines = []
    for model, row in scores.items():
        place = average_ranks(-np.asarray(row))[k]
        right, pairs = _pairs_of(k, ranks, row)
        wrong = pairs and right < pairs / 2
        kind, mark = (' class="down"', "&#9888; ") if wrong else ("", "")
        lines.append(f"<span>{escape(model)}</span><span{kind}>{row[k]:.3f}</span><span{kind}>{mark}{place:g}.</span>")
    return (
        f"<figure>{image(thumbnail(group.images[k]), 'jpeg', name)}"
        f'<figcaption><b>{escape(name)}</b><div class="tally">{"".join(lines)}</div></figcaption></figure>'
    )


def _pairs_of(k, ranks, scores):
    """Counts (right, pairs) among the pairs with image k."""
    scores = np.asarray(scores)
    other = ~np.isnan(ranks) & (ranks != ranks[k])
    right = other & (np.sign(ranks - ranks[k]) == np.sign(scores[k] - scores))
    return (0, 0) if np.isnan(ranks[k]) else (int(right.sum()), int(other.sum()))


def thumbnail(picture: Any) -> str:
    """Base64 of an image as JPEG, at most `THUMBNAIL` pixels per side."""
    opened = open_image(encoded(picture, ""))
    opened.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    opened.save(buffer, format="JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode()


def short_names(models: Sequence[str]) -> list[str]:
    """Shortens paths to their last parts (for an export, the run's name) if these differ; else returns the names."""
    paths = [Path(name).parent if Path(name).name == "export" else Path(name) for name in models]
    short = [path.name or name for path, name in zip(paths, models)]
    return short if len(set(short)) == len(models) else list(models)
