"""Files beside the package in a checkout, `configs/` and `convert/`, that an installed package holds inside itself."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_files(name: str) -> list[Path]:
    """The Python files of "configs" or "convert", sorted: those of the checkout, else those that were installed.

    Raises:
        FileNotFoundError: neither is there.
    """
    beside, inside = PACKAGE.parent / name, PACKAGE / name
    folder = beside if (PACKAGE.parent / "pyproject.toml").is_file() and beside.is_dir() else inside
    files = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    if not files:
        raise FileNotFoundError(f"{folder}: no {name} there; is imagereward-jax installed as a whole?")
    return files
