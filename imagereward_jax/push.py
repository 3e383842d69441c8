"""Uploads a model, an adapter or a scorer to the hub: `imagereward push FOLDER OWNER/NAME`.

    imagereward push runs/refl_sdxl_lora me/my-adapter --private

FOLDER is a run's workdir, of which the export is uploaded, or what `export`, `Trainer.save_pretrained` or a scorer's
`save` wrote. Its README.md is the card that the hub shows. The repository is made if there is none. `hf auth login`, or
the variable HF_TOKEN, says who you are. What was uploaded is opened by its name: docs/hub.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, program, say


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("push"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's workdir, or a folder that holds a model")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--private", action="store_const", const=True, help="if it is made, only you can see it")
    parser.add_argument("--message", default="Upload with imagereward-jax", help="of the commit")
    return parser.parse_args(argv)


def find_export(folder: Path) -> Path:
    """The folder to upload: `folder`, or the export in it if it is a run's workdir.

    Raises:
        FileNotFoundError: it is not there, or the run has no export yet. ValueError: it holds no model.
    """
    from imagereward_jax.rewards.imagereward import CONFIG_FILE, WEIGHTS_FILE
    from imagereward_jax.storage.folders import export_of
    from imagereward_jax.weights import adapters
    from imagereward_jax.weights.diffusers import INDEX

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    folder = export_of(folder)
    kinds = ((INDEX,), (adapters.FILE,), (CONFIG_FILE, WEIGHTS_FILE))
    if not any(all((folder / name).is_file() for name in kind) for kind in kinds):
        expected = "; or ".join(" and ".join(kind) for kind in kinds)
        raise ValueError(f"{folder} holds no model, adapter or scorer of this package: expected {expected}")
    return folder


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parses, uploads, prints; returns the exit status."""
    args = parse_args(argv)
    folder = find_export(args.folder)
    from imagereward_jax.weights import hub

    if not (folder / "README.md").is_file():
        say(f"warning: {folder} has no README.md, so the hub shows no card", file=sys.stderr)
    say(hub.upload_folder(folder, args.repo, private=args.private, message=args.message, token=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
