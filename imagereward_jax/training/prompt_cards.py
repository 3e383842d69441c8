"""The images of prompts side by side, as cards of a page: of one run over its evaluations, or of several runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from imagereward_jax.data.images import open_image
from imagereward_jax.pages.page import escape, folded, image, paragraph
from imagereward_jax.training.record import REWARD, Run
from imagereward_jax.training.samples import Key, PromptSamples, encode_webp

BUDGET = 800_000  # characters of all images of a page; further prompts are told in numbers
PROMPTS = 6  # the slider has no more positions than leave room for so many prompts,
POSITIONS = 24  # and no more than these; of more evaluations, some are spread evenly
SHEETS = 6  # positions of a slider over contact sheets
MOST = 18  # prompts with images
SHOWN = 12  # prompts that are not folded
SHEET = 1000  # pixels of a contact sheet


class Side(NamedTuple):
    """One column of a card: a caption (HTML) and images (base64 of WebP); with `at`, of that position of the slider."""

    caption: str
    images: Sequence[str]
    at: int | None = None


def positions(run: Run) -> list[int]:
    """The evaluations whose images a page shows: the first, the last and evenly spread ones between."""
    if not run.samples:
        return _spread(list(run.sheets), SHEETS)
    sizes = [sum(map(len, prompt.images)) for prompts in run.samples.values() for prompt in prompts.values()]
    most = BUDGET // (PROMPTS * max(max(sizes), 1))
    return _spread(list(run.samples), min(max(most, 2), POSITIONS))


def _spread(steps, most):
    last = len(steps) - 1
    return steps if last < most else [steps[round(index * last / (most - 1))] for index in range(most)]


def ordering_metric(names: Sequence[str]) -> str:
    """The one of the metrics by which prompts are ordered: the reward, else the first, "" if there are none."""
    return REWARD if REWARD in names else (*names, "")[0]


def signed(value: float | None) -> str:
    """A difference with its sign, and a class that colours it: HTML."""
    if value is None:
        return '<span class="soft">no verdict</span>'
    kind = "up" if value > 0 else "down" if value < 0 else "soft"
    return f'<span class="{kind}">{value:+.3g}</span>'


def number(value: float | None) -> str:
    """A score with three digits."""
    return "no verdict" if value is None else f"{value:.3g}"


def difference(before: float | None, after: float | None) -> float | None:
    """after - before; None if one of them is."""
    return None if before is None or after is None else after - before


def ends_first(keys: Sequence[Key], value: Callable[[Key], float | None]) -> list[Key]:
    """Sorts keys: that of the largest value, of the least, of the second largest, ...; those without one last."""
    ranked = sorted((key for key in keys if value(key) is not None), key=lambda key: -value(key))
    count = len(ranked)
    turns = [ranked[at // 2] if at % 2 == 0 else ranked[count - 1 - at // 2] for at in range(count)]
    return turns + [key for key in keys if value(key) is None]


def cards(
    keys: Sequence[Key],
    value: Callable[[Key], float | None],
    sides: Callable[[Key], list[Side]],
    heading: Callable[[Key], str],
    titles: tuple[str, str],
) -> str:
    """Cards of the prompts at both ends of an order, as many as the budget of images allows; all but SHOWN folded.

    Args:
        keys: in the order that the budget is spent. value: their place in the order.
        sides: the columns of a card. heading: HTML under its prompt.
        titles: of the upper half and of the lower half, text.
    """
    made, spent = {}, 0
    for key in keys:
        columns = sides(key)
        size = sum(len(data) for column in columns for data in column.images)
        if not size or len(made) == MOST or spent + size > BUDGET:
            continue
        spent += size
        made[key] = columns
    known = sorted((key for key in made if value(key) is not None), key=lambda key: -value(key))
    shown = [key for key in made if value(key) is not None][:SHOWN]
    upper = [key for key in known[: -(-len(known) // 2)] if key in shown]
    lower = [key for key in reversed(known) if key in shown and key not in upper]
    others = [key for key in dict.fromkeys([*known, *made]) if key not in shown]

    def grid(some, level):
        made_of = "".join(card(key[0], heading(key), made[key], level=level) for key in some)
        broad = any(sum(side.at is None for side in made[key]) > 2 for key in some)
        return f'<div class="{"cards broad" if broad else "cards"}">{made_of}</div>'

    parts = [f"<h3>{escape(title)}</h3>{grid(some, 4)}" for title, some in zip(titles, (upper, lower)) if some]
    if others and shown:
        parts.append(folded(f"{len(others)} more prompts", grid(others, 3)))
    return "".join(parts) if shown else grid(others, 3)


def card(prompt: str, heading: str, columns: Sequence[Side], *, level: int = 4, broad: bool = False) -> str:
    """One card; columns that have a position of the slider share a place, at which the last one stands.

    Args:
        level: of its heading. broad: for images as wide as contact sheets.
    """
    last = max((side.at for side in columns if side.at is not None), default=None)
    fixed = "".join(f'<div class="side">{_side(side, prompt)}</div>' for side in columns if side.at is None)
    moving = "".join(
        f'<div data-at="{side.at}"{"" if side.at == last else " hidden"}>{_side(side, prompt)}</div>'
        for side in columns
        if side.at is not None
    )
    moving = moving and f'<div class="side">{moving}</div>'
    pair = "pair sheets" if broad else "pair"
    return (
        f'<article class="card"><h{level}>{escape(prompt)}</h{level}>{paragraph(heading, "gain")}'
        f'<div class="{pair}">{fixed}{moving}</div></article>'
    )


def _side(side, prompt):
    kind = "images four" if len(side.images) > 2 else "images"
    images = "".join(image(data, "webp", prompt) for data in side.images)
    return f'<p>{side.caption}</p><div class="{kind}">{images}</div>'


def sheet(path: Path) -> str:
    """A contact sheet as base64 of WebP."""
    return encode_webp(open_image(path.read_bytes(), str(path)), SHEET)


def scores_table_rows(
    keys: Sequence[Key], columns: Sequence[Mapping[Key, PromptSamples]], metric: str
) -> list[list[str]]:
    """Rows of HTML: the prompt and its mean score in each of the columns."""
    return [
        [escape(key[0]), *(number(there[key].mean(metric) if key in there else None) for there in columns)]
        for key in keys
    ]


def sampling(run: Run) -> str:
    """How a run's evaluations sample, text."""
    settings = run.config["eval"]
    sampler, count, scale = (settings.get(name) for name in ("sampler", "num_steps", "guidance_scale"))
    told = [sampler or "", f"{count} steps" if count else ""]
    told += ["no guidance" if scale <= 1 else f"guidance {scale:g}"] if scale is not None else []
    return ", ".join(filter(None, told)) or "sampled as the model's folder says"
