"""Plans a run before it is paid for: memory, FLOPs, collectives and compile time on hardware that is not here.

    imagereward plan --config configs/refl_sdxl_lora.py --topology v5e:2x4 [--config.field=value ...]

Compiles the training step of a config, of any method, for a topology, from shapes: it needs no weights, no download
and no accelerator. A TPU slice is v4:, v5e:, v5p: or v6e: and a shape (v5e:16x16, v5p:2x2x2). GPUs are a100:, h100:,
h200: or b200: and a number (h200:8). cpu:N is this machine as N virtual devices. A model is a folder, whose config.json
files are read, or a published name such as stabilityai/stable-diffusion-xl-base-1.0. The size of the largest group
counts in a scorer's data; if the file is not here, nine images are assumed, as in ImageRewardDB, and the plan says so.
TPUs need the extra `tpu` (or libtpu alone), GPUs `cuda13` (or jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cudnn-cu13).

Exit status: 0 it fits; 3 it does not; 2 bad input; 1 it could not be planned; 130 after Ctrl-C.
"""

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imagereward_jax.command import command
from imagereward_jax.terminal import Parser, program, say

if TYPE_CHECKING:
    from imagereward_jax.planning.topologies import Topology

USAGE = "--config RECIPE --topology NAME [--json] [--config.field=value ...]"


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses; returns (this command's arguments, the config's arguments)."""
    parser = Parser(
        prog=program("plan"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:2x2x2, h200:8, cpu:8, ...")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--search",
        action="store_true",
        help="also find the largest batch and the smallest slice that fit; compiles some five times",
    )
    return parser.parse_known_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parses, plans, prints; returns the exit status."""
    args, rest = parse_args(sys.argv[1:] if argv is None else argv)
    use_virtual_devices(args.topology)
    from imagereward_jax.planning.topologies import find_topology
    from imagereward_jax.recipes import validate
    from imagereward_jax.train import parse_flags

    topology = find_topology(args.topology)
    config, *_ = parse_flags(["plan", *rest], usage=f"usage: {program('plan')} {USAGE}")
    validate(config)
    figures = print_plan(config, topology, args)
    return 0 if figures["fits"] else 3


def print_plan(config: Any, topology: "Topology", args: argparse.Namespace) -> dict[str, Any]:
    """Plans and prints; returns the figures."""
    import jax

    from imagereward_jax.planning import report, search

    tell = functools.partial(say, file=sys.stderr)

    try:
        figures = report.plan(config, topology)
        if args.search:
            samples, batch = search.largest_batch(config, topology, tell, known=figures)
            figures["largest_batch"] = {"samples_per_chip": samples, "batch_size": batch}
            figures["smallest_slice"] = search.smallest_slice(config, topology, tell, known=figures)
    except jax.errors.JaxRuntimeError as error:
        raise report.as_error(error) from error
    say(json.dumps(figures, indent=2) if args.json else report.as_text(figures, config))
    if args.search and not args.json:
        say(f"largest batch that fits: {batch} ({samples} sample(s) a chip at a time)")
        say(f"smallest slice that fits: {figures['smallest_slice'] or 'none of this kind'}")
    return figures


def use_virtual_devices(name: str) -> None:
    """Makes jax see only the CPU, as N devices for "cpu:N"; compiling for other hardware needs no device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if found := re.fullmatch(r"cpu:([1-9]\d*)", name):
        others = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={found[1]}".strip()


if __name__ == "__main__":
    sys.exit(main())
