"""Every field of a config with its value, its bounds and the comment beside it in the source, as help shows them."""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagereward_jax.config import Section, plain
from imagereward_jax.recipes import sections_of

WIDTH = 100


def describe(config: Any) -> str:
    """Lists the fields of a config: `--config.NAME=VALUE`, then what may be said of it."""
    blocks = [f"--config.method.name={config.method.name}"]
    for section in sections_of(config):
        values = config[section.location] if section.location else config
        blocks.append("\n".join(_lines(section, values)))
    return "\n\n".join(blocks)


class Field(NamedTuple):
    """A field: its path ("config.optimizer.b1"), its value (None: a section), and its comment and bounds."""

    path: str
    value: str | None
    meaning: str


def fields_of(section: type[Section], values: Any) -> Iterator[Field]:
    """The fields of a section, and of sections within it.

    Args:
        values: the section of a config.
    """
    within, said = {one.location: one for one in Section.__subclasses__()}, comments(section)
    for name, bounds in section.bounds().items():
        path, value = section.name_of(name), values.get(name)
        meaning = "; ".join(filter(None, (said.get(name, ""), _bounds(bounds))))
        if path.removeprefix("config.") in within:
            yield Field(path, None, meaning)
            yield from fields_of(within[path.removeprefix("config.")], value)
        else:
            yield Field(path, _written(value), meaning)


def _lines(section, values):
    for path, value, meaning in fields_of(section, values):
        if value is None:
            yield f"--{path}: {meaning}"
        else:
            yield f"--{path}={value}"
            yield from textwrap.wrap(meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")


def comments(section: type[Section]) -> dict[str, str]:
    """{field: the comment after it or above it}, of a section and the sections that it extends; {} without source."""
    found = {}
    for kind in reversed(section.__mro__):
        if issubclass(kind, Section) and kind is not Section:
            try:
                source = textwrap.dedent(inspect.getsource(kind))
            except (OSError, TypeError):
                continue
            found |= _comments_of(source)
    return found


def _comments_of(source):
    at, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            at[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        told = [at[line] for line in range(first, node.end_lineno + 1) if line in at]
        found[node.target.id] = " ".join(told)
    return found


def _written(value):
    """As the command line takes it; what a config file alone can hold as a dict."""
    if hasattr(value, "to_dict"):
        return repr(value.to_dict())
    return value if isinstance(value, str) else repr(value)


def _bounds(metadata):
    if "choices" in metadata:
        return "one of " + ", ".join(map(str, metadata["choices"]))
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return ", ".join(f"{words[name]} {plain(value)}" for name, value in metadata.items() if name in words)
