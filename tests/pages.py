"""The Markdown pages of the repository, cut into their blocks of code.

Every fenced block names its language. An HTML comment right above the fence, which no reader sees, says what the tests
do with it:

    <!-- test: run -->               a shell block: executed by the slow tests
    <!-- test: slow -->              a Python block: executed by the slow tests alone
    <!-- test: not run, REASON -->   checked as far as that goes without running

A Python block without a mark is executed, with the names of the blocks above it on its page. One with a
`title="FILE.py"` is written to that file. A shell block has a mark; each of its commands is parsed, run or not.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
SHELL, PYTHON, SHOWN = {"sh", "bash"}, {"python"}, {"json", "text", "yaml"}
INDENTED = "not run, indented"  # the mark of blocks without a fence
_FENCE = re.compile(r"(?:<!-- test: (?P<mark>[^>]*?) -->\n)?```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.M)


class Block(NamedTuple):
    """A block of code: its page and line there, language, title ("" for none), mark ("" for none) and text."""

    page: Path
    line: int
    language: str
    title: str
    mark: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order; indented ones that start a program are shell blocks that are not run."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        language, _, rest = fence["info"].partition(" ")
        title = re.fullmatch(r'title="([\w./]+)"', rest)
        line = text.count("\n", 0, fence.start("info")) + 1
        found.append(Block(page, line, language, title[1] if title else "", fence["mark"] or "", fence["code"]))
    outside = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for indented in _INDENTED.finditer(outside):
        code = re.sub("^    ", "", indented[0], flags=re.M)
        if re.match(r"python |imagereward |pip ", code):
            line = outside.count("\n", 0, indented.start()) + 1
            found.append(Block(page, line, "sh", "", INDENTED, code))
    return sorted(found, key=lambda block: block.line)


def commands_of(code: str) -> list[list[str]]:
    """The simple commands of a shell block, each as words, without variables that are set before it."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>"):
                if words:
                    commands.append(words)
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return commands
