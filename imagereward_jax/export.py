"""Writes the model of a checkpoint, also while the run goes on: `imagereward export WORKDIR OUT`.

    imagereward export runs/refl_sdxl_lora checked --step 200

OUT is what the run's own end writes to WORKDIR/export: a diffusers folder, an adapter, or a reward's folder, with its
model card. Without --step it is of the latest checkpoint. The weights that the run started from have to be where they
were; one process is enough, also for a run of several.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, program, say


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog=program("export"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="of a run of `train`")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the latest")
    parser.add_argument("--overwrite", action="store_true", help="replace an OUT that is such an export")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parses, exports, prints; returns the exit status."""
    args = parse_args(argv)
    from imagereward_jax.training.workdir import read_config

    config = read_config(args.workdir)
    from imagereward_jax.assembly.given import Given
    from imagereward_jax.assembly.run import assemble
    from imagereward_jax.recipes import validate
    from imagereward_jax.training.export import export_checkpoint

    validate(config)
    put_together = functools.partial(assemble, given=Given(workdir=args.workdir))
    step = export_checkpoint(config, put_together, args.workdir, args.out, step=args.step, overwrite=args.overwrite)
    say(f"wrote the checkpoint of step {step} to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
