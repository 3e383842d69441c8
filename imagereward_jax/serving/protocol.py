"""The JSON of requests and answers, as docs/serve.md describes it."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class BadRequest(ValueError):
    """A request that cannot be answered at all; the message says what was expected.

    Args:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Item(NamedTuple):
    """One image to score: the bytes of its file (None if it was not base64), and the row that it belongs to."""

    image: bytes | None
    prompt: str
    metadata: Mapping[str, Any]


class Result(NamedTuple):
    """Scores of an item by name, "" for the score itself, None for no verdict; or why there are none."""

    scores: Mapping[str, float | None]
    error: str | None = None


def read_request(body: bytes) -> list[Item]:
    """Reads {"images": [base64, ...], "prompts": [text, ...], "metadata": [object, ...]}; metadata may be left out.

    Raises:
        BadRequest: the body is anything else, or the lists differ in length.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON ({error})") from error
    if not isinstance(request, dict):
        raise BadRequest("expected a JSON object with images and prompts")
    if unknown := sorted(request.keys() - {"images", "prompts", "metadata"}):
        raise BadRequest(f"unknown fields {', '.join(map(repr, unknown))}; expected images, prompts and metadata")
    images = _column(request, "images", str, "texts in base64")
    prompts = _column(request, "prompts", str, "texts")
    metadata = [{} for _ in images]
    if request.get("metadata") is not None:
        metadata = _column(request, "metadata", dict, "objects")
    for name, column in (("prompts", prompts), ("metadata", metadata)):
        if len(column) != len(images):
            raise BadRequest(f"{len(column)} {name} for {len(images)} images; expected one for each image")
    return [Item(_decoded(image), prompt, row) for image, prompt, row in zip(images, prompts, metadata)]


def _column(request, name, kind, expected):
    values = request.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise BadRequest(f"{name}: expected a list of {expected}")
    return values


def _decoded(text):
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def answer(results: Sequence[Result]) -> dict[str, Any]:
    """Makes {"scores": [...], "named": {name: [...]}, "errors": [...]}, a row for each result."""
    names = dict.fromkeys(name for result in results for name in result.scores if name)
    return {
        "scores": [result.scores.get("") for result in results],
        "named": {name: [result.scores.get(name) for result in results] for name in names},
        "errors": [result.error for result in results],
    }
