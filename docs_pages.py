"""Pages of the site that mkdocs makes while it builds, from the code and from files at the top of the repository.

`reference/commands.md` is each command's own help, `reference/config.md` every field of every method, and
`reference/recipes.md` what each recipe says of itself.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
FROM_THE_TOP = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that have no file in docs/."""
    made = {"reference/commands.md": commands(), "reference/config.md": fields(), "reference/recipes.md": recipes()}
    for page, name in FROM_THE_TOP.items():
        made[page] = (ROOT / name).read_text(encoding="utf-8")
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that hold in the repository into those of the site."""
    if page.file.src_uri in FROM_THE_TOP:
        markdown = markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    for made, name in FROM_THE_TOP.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(name)}", f"]({up}{made}", markdown)
    return markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Names the theme's search dialog to readers of screens."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')


def commands() -> str:
    """The help of every command."""
    from imagereward_jax.__main__ import COMMANDS
    from imagereward_jax.completion import help_of

    parts = ["# Commands\n\nEach is also `python -m imagereward_jax.NAME`. `imagereward --version` names the version."]
    for name, does in COMMANDS.items():
        text = help_of(name)
        parts.append(f"## imagereward {name}\n\n{does[0].upper()}{does[1:]}." + (_text(text) if text else ""))
        if name == "convert":
            parts += [
                f"- `imagereward convert {one.stem.replace('_', '-')}`: {_docstring(one)[0]}"
                for one in _files("convert")
            ]
    return "\n\n".join(parts) + "\n"


def fields() -> str:
    """A table of fields for every section of a config, then one for the own fields of each method."""
    from imagereward_jax.config_help import fields_of
    from imagereward_jax.recipes import default_config, sections_of

    users: dict[type, list[str]] = {}
    values = {}
    methods = method_names()
    for method in methods:
        config = default_config(method)
        for section in sections_of(config):
            users.setdefault(section, []).append(method)
            values.setdefault(section, config[section.location] if section.location else config)
    parts = [
        "# Config fields\n\nEvery field of every method with its default. `imagereward train --config NAME --help` "
        "prints those of one recipe with its values. Each is set in a config file "
        "(`config.optimizer.learning_rate = 2e-5`) or on the command line (`--config.optimizer.learning_rate=2e-5`)."
    ]
    for section, by in users.items():
        if section.location == "method":
            title, text = f"config.method of {by[0]}", ""
        else:
            title = f"config.{section.location}: {section.__name__}" if section.location else "config"
            text = f"{section.__doc__.strip()} Methods: {'all' if by == methods else ', '.join(by)}.\n\n"
        rows = [
            f"| {_code(path)} | {_code(value)} | {_cell(meaning)} |"
            for path, value, meaning in fields_of(section, values[section])
        ]
        parts.append(f"## {title}\n\n{text}| field | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def method_names() -> list[str]:
    """The built-in methods: modules with a function `make`."""
    files = _files("imagereward_jax/methods")
    return [path.stem for path in files if re.search(r"^def make\(", path.read_text(encoding="utf-8"), re.MULTILINE)]


def recipes() -> str:
    """What each recipe trains, its command, hardware and result, as its file says."""
    parts = ["# Recipes\n\n`imagereward train --config NAME` finds each by its name; its file is `configs/NAME.py`."]
    for path in _files("configs"):
        first, rest = _docstring(path)
        parts.append(f"## {path.stem}\n\n{_escape(first)}\n\n{_escape(rest)}")
    return "\n\n".join(parts) + "\n"


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def _docstring(path: Path) -> tuple[str, str]:
    """The first line of a file's docstring, and the rest."""
    first, _, rest = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")
    return first, rest


def _code(text: str | None) -> str:
    """Text as code in a table's cell; "" of None, and of an empty value quotes."""
    return "" if text is None else f"`{text or chr(34) * 2}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def _escape(text: str) -> str:
    """Text of a comment or docstring as Markdown that shows it as it is; indented lines stay code."""
    lines = [line if line.startswith("    ") else re.sub(r"([*<])", r"\\\1", line) for line in text.split("\n")]
    return "\n".join(lines)


def _text(text: str) -> str:
    return f"\n\n```text\n{text.rstrip()}\n```"
