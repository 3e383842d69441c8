"""HTML page of results: the tables, and the prompts with the largest disagreement, with images.

One file, no script, no network.
"""

import base64
import html
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

GENERATOR = '<meta name="generator" content="imagereward_jax.evaluate">'
THUMBNAIL = 192
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:14px}td,th{padding:.3em .7em;white-space:nowrap;
border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}section{border-top:1px solid #ddd;margin-top:1.5em}
section h3{margin:.8em 0 .2em;font-size:1em}.note{color:#666;margin:0}.row{display:flex;gap:1em;flex-wrap:wrap;
margin:.8em 0}figure{margin:0;width:192px;font-size:13px}figure img{width:192px;height:192px;object-fit:contain;
background:#f2f2f2}figcaption b{display:block}.scores{display:grid;grid-template-columns:1fr auto auto;gap:0 .6em;
font-variant-numeric:tabular-nums}.scores span:nth-child(3n+1){overflow:hidden;text-overflow:ellipsis;
white-space:nowrap}.off{color:#b00020}"""


def is_page(path: Path) -> bool:
    """Whether a file is one that `results_page` made."""
    with open(path, "rb") as file:
        return GENERATOR.encode() in file.read(1000)


def results_page(
    title: str,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    groups: Sequence[RankedPrompt],
    scores: dict[str, Sequence[Sequence[float]]],
    *,
    shown: int = 20,
) -> str:
    """Renders the page.

    Args:
        title: heading.
        tables: list of (header, rows) of text.
        notes: list of lines under the tables.
        groups: P `RankedPrompt`s; empty if the human order is unknown.
        scores: {model: [P] lists, the score of every image}.
        shown: number of prompts.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(_table(*table) for table in tables)]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    if groups:
        parts.append(_worst_prompts(groups, scores, shown))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"{GENERATOR}<title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _table(header, rows):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def worst_first(groups: Sequence[RankedPrompt], scores: dict[str, Sequence[Sequence[float]]]) -> list[int]:
    """Sorts prompt indices by disagreement between models and people, largest first.

    Prompts without a pair are left out. The baseline "random" counts only if it is the only model.
    """
    judged = [rows for model, rows in scores.items() if model != RANDOM] or list(scores.values())
    wrong = disagreement(groups, judged)
    order = np.argsort(-np.where(np.isnan(wrong), -1, wrong), kind="stable")
    return [int(i) for i in order if not np.isnan(wrong[i])]


def _worst_prompts(groups, scores, shown):
    order = worst_first(groups, scores)[:shown]
    head = (
        f"<h2>Where the models disagree most with people: {len(order)} of {len(groups)} prompts</h2>"
        '<p class="note">Best image by people first. Beside each model\'s score is the place that it gives the '
        "image; red if the model puts it on the wrong side of more than half of the others.</p>"
    )
    return head + "".join(_prompt(groups[i], {model: rows[i] for model, rows in scores.items()}) for i in order)


def _prompt(group, scores):
    ranks = known_ranks(group.ranks)
    agreement = []
    for model, row in scores.items():
        right, pairs = preference_counts(ranks, row)
        agreement.append(f"{model} {right} of {pairs} pairs")
    figures = "".join(_figure(group, k, ranks, scores) for k in np.argsort(ranks, kind="stable"))
    return (
        f"<section><h3>{html.escape(group.prompt)}</h3>"
        f'<p class="note">{html.escape(group.id)}: {html.escape(", ".join(agreement))} as people</p>'
        f'<div class="row">{figures}</div></section>'
    )


def _figure(group, k, ranks, scores):
    human = "not ranked" if np.isnan(ranks[k]) else f"people: {ranks[k]:g}"
    name = f"{group.labels[k]}, {human}" if group.labels else human
    lines = []
    for model, row in scores.items():
        place = average_ranks(-np.asarray(row))[k]
        right, pairs = _pairs_of(k, ranks, row)
        mark = ' class="off"' if pairs and right < pairs / 2 else ""
        lines.append(f"<span>{html.escape(model)}</span><span{mark}>{row[k]:.3f}</span><span{mark}>{place:g}.</span>")
    return (
        f'<figure><img alt="{html.escape(name)}" src="{thumbnail(group.images[k])}"><figcaption>'
        f'<b>{html.escape(name)}</b><div class="scores">{"".join(lines)}</div></figcaption></figure>'
    )


def _pairs_of(k, ranks, scores):
    """Counts (right, pairs) among the pairs with image k."""
    scores = np.asarray(scores)
    other = ~np.isnan(ranks) & (ranks != ranks[k])
    right = other & (np.sign(ranks - ranks[k]) == np.sign(scores[k] - scores))
    return (0, 0) if np.isnan(ranks[k]) else (int(right.sum()), int(other.sum()))


def thumbnail(image: Any) -> str:
    """Encodes an image as a data URL: JPEG, at most `THUMBNAIL` pixels per side."""
    image = open_image(encoded(image, ""))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def short_names(models: Sequence[str]) -> list[str]:
    """Shortens paths to their last parts (for an export, the run's name) if these differ; else returns the names."""
    paths = [Path(name).parent if Path(name).name == "export" else Path(name) for name in models]
    short = [path.name or name for path, name in zip(paths, models)]
    return short if len(set(short)) == len(models) else list(models)
