"""The command `imagereward`, also `python -m imagereward_jax`: starts one of the commands of this package.

    imagereward train --config refl_tiny
    imagereward score --prompt "a cat" 1.png 2.png
    imagereward generate --model runs/refl_tiny/export --prompt "a large red circle" --out images
    imagereward train --help                 # of each: what it takes, and examples
    eval "$(imagereward --completion bash)"  # completes commands, flags and recipes; also zsh, fish

--config takes a file, or the name of one of the package's recipes (`imagereward recipes` lists them). Exit status: 0
done; 1 failed; 2 bad input; 130 after Ctrl-C; others are said by the command's own help.
"""

import ast
import importlib
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.config import did_you_mean
from imagereward_jax.shipped import shipped_files
from imagereward_jax.terminal import say

COMMANDS = {
    "train": "tune a model by rewards, images or preferences, or train a scorer",
    "score": "score images, or the rows of a table",
    "generate": "make images, of a tuned model beside its base",
    "demo": "a page in the browser with a tuned model beside its base",
    "evaluate": "how well scorers agree with people",
    "plan": "memory, FLOPs and time of a run on hardware that is not here",
    "compare": "put several runs into one page",
    "serve": "score over HTTP, for other programs and machines",
    "export": "write the model of a checkpoint, also while the run goes on",
    "push": "upload a model, adapter or scorer to the hub",
    "convert": "convert models and adapters between formats; make data",
    "recipes": "list the package's recipes",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Starts a command; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        say(f"{__doc__.strip()}\n\ncommands:\n{_listed(COMMANDS)}")
    elif name == "--version":
        say(f"imagereward-jax {metadata.version('imagereward-jax')}")
    elif name == "--completion":
        _completion(rest)
    elif name == "recipes":
        say(_listed({path.stem: _first_line(path) for path in shipped_files("configs")}))
    elif name == "convert":
        return _convert(rest)
    elif name in COMMANDS:
        sys.argv = [f"imagereward {name}", *rest]
        return importlib.import_module(f"imagereward_jax.{name}").main(script=True)
    else:
        raise ValueError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}: one of {', '.join(COMMANDS)}")
    return 0


def _completion(argv):
    """Prints the script of a shell."""
    from imagereward_jax.completion import script

    shell, *more = argv or [""]
    if more:
        raise ValueError(f"--completion {shell}: unexpected argument {more[0]!r}")
    recipes = [path.stem for path in shipped_files("configs")]
    say(script(shell, COMMANDS, recipes, list(_conversions())))


def _conversions():
    return {path.stem.replace("_", "-"): path for path in shipped_files("convert")}


def _convert(argv):
    """Runs a script of convert/."""
    scripts = _conversions()
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        listed = _listed({name: _first_line(path) for name, path in scripts.items()})
        say(f"imagereward convert NAME ...; imagereward convert NAME --help says what it takes\n\n{listed}")
        return 0
    path = scripts.get(name.replace("_", "-"))
    if path is None:
        raise ValueError(f"unknown conversion {name!r}{did_you_mean(name, scripts)}: one of {', '.join(scripts)}")
    sys.argv = [str(path), *rest]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].rstrip(".,:")


def _listed(texts):
    width = max(map(len, texts))
    return "\n".join(f"  {name:{width}}  {text}" for name, text in texts.items())


if __name__ == "__main__":
    sys.exit(main(script=False))  # the command that it starts handles Ctrl-C, as of the script `imagereward`
