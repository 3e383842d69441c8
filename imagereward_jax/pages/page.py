"""The shell of a page: its style, its one script (a slider), and what a browser may do with it."""

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from imagereward_jax.storage.files import write_text

WIDEST = 34  # characters of a table that a phone shows as one
_TAG = re.compile("<[^>]*>")
# Elements with data-at show if the slider stands there. Without scripts there is no slider, and the last ones show.
SCRIPT = """const slider=document.getElementById("slider");
if(slider){const show=()=>{for(const part of document.querySelectorAll("[data-at]"))
part.toggleAttribute("hidden",part.dataset.at!==slider.value);
slider.setAttribute("aria-valuetext",document.querySelector("output [data-at]:not([hidden])").textContent)};
slider.addEventListener("input",show);slider.closest(".slider").hidden=false;show()}"""


def escape(text: object) -> str:
    """Text for a page, also in an attribute: prompts and names of others stay text."""
    return html.escape(str(text))


def write_page(path: str | Path, title: str, parts: Iterable[str], *, generator: str) -> None:
    """Writes a page; it appears whole or not at all.

    The page allows itself no network and no script but its own, whatever its parts hold.

    Args:
        title: text. parts: HTML.
        generator: the command that makes such pages, by which `is_page` knows them again.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    allowed = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'{_mark(generator)}<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    body = f"<main>{''.join(parts)}</main><script>{SCRIPT}</script>"
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def _mark(generator):
    return f'<meta name="generator" content="{generator}">'


def is_page(path: Path, generator: str) -> bool:
    """Whether a file is a page of this generator."""
    with open(path, "rb") as file:
        return _mark(generator).encode() in file.read(1000)


def check_replaceable(path: Path, flag: str, generator: str, *, overwrite: bool) -> None:
    """Refuses to write a page where it cannot be, or over a file that is no such page.

    Raises:
        FileNotFoundError, FileExistsError: naming the flag and the way out.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not overwrite and not is_page(path, generator)):
        raise FileExistsError(
            f"{flag} {path} exists and is no page of this command; choose another file, or pass --overwrite"
        )


def _width(rows):
    """Characters of a table's widest cells; the first column is broken into lines."""
    plain = [[len(html.unescape(_TAG.sub("", cell))) for cell in row] for row in rows]
    first, *others = map(max, zip(*plain))
    return min(first, 16) + sum(others)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells whose first column names the row; of a wide one, phones show every row as a list."""
    rows = list(rows)
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td data-label="{name}"><span>{cell}</span></td>' for name, cell in zip(header[1:], others))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    if _width([header, *rows]) <= WIDEST:
        return f"<table>{content}</table>"
    label = f"table of {', '.join(_TAG.sub('', cell) for cell in header)}"
    whole = f'<table class="wide">{content}</table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{whole}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of (name, value), HTML; empty values are left out."""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs if value)
    return f'<dl class="facts">{items}</dl>'


def paragraph(content: str, kind: str = "") -> str:
    """A paragraph of HTML, of a class of style.css; "" if there is nothing to say."""
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{content}</p>" if content else ""


def folded(summary: str, content: str) -> str:
    """HTML that opens at a click on its summary."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def image(data: str, kind: str, alt: str) -> str:
    """An image in the page.

    Args:
        data: base64. kind: "webp" or "jpeg". alt: text.
    """
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{escape(data)}">'


def slider(labels: Sequence[str], caption: str) -> str:
    """The slider over what has data-at, from 0; it stands at the last. labels, caption: text."""
    last = len(labels) - 1
    hidden = [" hidden"] * last + [""]
    texts = "".join(
        f'<span data-at="{at}"{hide}>{escape(label)}</span>' for at, (label, hide) in enumerate(zip(labels, hidden))
    )
    return (
        f'<div class="slider" hidden><label for="slider">{escape(caption)}</label>'
        f'<input type="range" id="slider" min="0" max="{last}" value="{last}">'
        f'<output for="slider">{texts}</output></div>'
    )
