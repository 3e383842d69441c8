"""Text for a terminal: what files and paths hold is shown, and never steers the terminal."""

import argparse
import re
import sys
from typing import NoReturn, TextIO

# Control characters (C0, DEL, C1), line separators, marks that reorder text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: object) -> str:
    r"""Formats text as one line that a terminal shows as it is: \x1b for an escape, \u202e for a mark that reorders.

    JSON of `json.dumps` stays the same JSON: outside its strings there is nothing to escape.
    """
    return _UNSAFE.sub(_code, str(text))


def _code(found):
    return f"\\x{ord(found[0]):02x}" if found[0] < " " else f"\\u{ord(found[0]):04x}"


def say(text: object, file: TextIO | None = None) -> None:
    """Prints text at once, each of its lines escaped.

    Args:
        file: stdout by default.
    """
    shown = "\n".join(map(escape, str(text).split("\n")))
    encoding = getattr(sys.stdout if file is None else file, "encoding", None) or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def program(name: str) -> str:
    """What a user types to start the command `name`, as help shows it."""
    return sys.argv[0] if sys.argv[0] == f"imagereward {name}" else f"python -m imagereward_jax.{name}"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are escaped: a shell's * puts names of files on the command line."""

    def error(self, message: str) -> NoReturn:
        """Prints usage and error, and exits with status 2."""
        super().error(escape(message))
