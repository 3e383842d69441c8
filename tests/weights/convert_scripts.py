"""The commands of convert/, called in this process."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "convert"


def load(name: str) -> ModuleType:
    """The script convert/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object, code: int = 0) -> str:
    """Runs a script, which has to end with exit status `code`; returns what it printed (of an error, to stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert load(name).main(list(map(str, arguments))) == code, err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()
