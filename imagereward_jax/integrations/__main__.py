"""Copies the scripts of other programs into them: `python -m imagereward_jax.integrations comfyui PATH`.

They carry their client and the path of this Python, from whose environment they start a server. The same command
again replaces what it copied.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, say

HERE = Path(__file__).parent
CLIENT, CLIENT_COPY = HERE.parent / "rewards" / "http_client.py", "imagereward_client.py"
# {program: (folder that it has for such things, {place in the copy: file here})}
PROGRAMS = {
    "comfyui": ("custom_nodes", {"__init__.py": HERE / "comfyui" / "__init__.py", CLIENT_COPY: CLIENT}),
    "webui": (
        "extensions",
        {
            "scripts/imagereward_scores.py": HERE / "sdwebui.py",
            "imagereward_prompts.py": HERE / "webui_prompts.py",
            CLIENT_COPY: CLIENT,
        },
    ),
}


def install(program: str, folder: Path, python: str = sys.executable) -> Path:
    """Copies the script of a program into its folder; returns the new folder.

    Args:
        program: "comfyui", or "webui" (AUTOMATIC1111, Forge, SD.Next).
        python: what the script starts a server with.

    Raises:
        FileNotFoundError: `folder` is not such a program's. FileExistsError, StorageError: see `new_folder`.
    """
    from imagereward_jax.rewards.http_client import PYTHON_FILE
    from imagereward_jax.storage.folders import new_folder

    place, files = PROGRAMS[program]
    if not (folder / place).is_dir():
        raise FileNotFoundError(f"{folder} has no folder {place}: expected the folder of {program}")
    target = folder / place / "imagereward"
    with new_folder(target, overwrite=True, marker=CLIENT_COPY) as new:
        for name, file in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new / name)
        (new / PYTHON_FILE).write_text(python + "\n", encoding="utf-8")
    return target


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m imagereward_jax.integrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path, help="where the program is")
    args = parser.parse_args(argv)
    target = install(args.program, args.folder)
    say(f"{target}: restart {args.program}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
