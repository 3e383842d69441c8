"""The rooms of the package import in one direction, as docs/architecture.md draws it."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "imagereward_jax"
# Each room may import those before it.
ROOMS = (
    *("config", "storage", "pages", "terminal", "command", "compilation_cache", "distributed", "shipped"),
    *("models", "diffusion", "weights", "data", "rewards", "pipelines"),
    *("methods", "sections", "recipes", "config_help", "training", "assembly", "planning", "trainer"),
    *("bulk_scoring", "agreement", "serving", "integrations"),
    *("train", "plan", "generate", "score", "evaluate", "serve", "export", "compare", "push", "side_by_side", "demo"),
    *("completion", "__main__"),
)


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imagereward_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_no_room_imports_one_above_it():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the public API, imported at first use
        wrong += [
            f"{path.relative_to(PACKAGE)} imports {other}"
            for other in imported_rooms(path)
            if other != room and ROOMS.index(other) > ROOMS.index(room)
        ]
    assert not wrong, wrong


def test_methods_are_handed_their_parts():
    """They import no assembly, no training, no pipeline, no files."""
    for path in (PACKAGE / "methods").glob("*.py"):
        assert set(imported_rooms(path)) <= {"config", "methods", "models", "diffusion", "rewards"}, path


def test_every_room_is_drawn():
    """On the page every folder, in the drawing every room but what starts commands, explains fields, or is loaded by
    other programs."""
    docs = PACKAGE.parent / "docs"
    page = (docs / "architecture.md").read_text(encoding="utf-8")
    rooms = [path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert all(f"{room.name}/" in page for room in rooms)
    drawing = (docs / "architecture.svg").read_text(encoding="utf-8")
    assert sorted(re.findall(r'class="name"[^>]*>(\w+)<', drawing)) == sorted(
        set(ROOMS)
        - {"integrations", "config_help", "export", "compare", "push", "side_by_side", "demo", "completion", "__main__"}
    )


def test_one_module_opens_image_files():
    """`data.images`, with a list of formats: of others, Pillow starts programs (PostScript in a file named .png)."""
    calls = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                calls[f"{path.relative_to(PACKAGE)} imports from PIL.Image"] = []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls[str(path.relative_to(PACKAGE))] = [keyword.arg for keyword in node.keywords]
    assert calls == {"data/images.py": ["formats"]}
