"""Serves a scorer over HTTP: `imagereward serve --reward ImageReward-v1.0`.

POST /score takes images and prompts as JSON and answers their scores; GET /health says what is served. Requests of all
clients are scored together in batches. The protocol, limits and clients: docs/serve.md. If the environment variable
IMAGEREWARD_TOKEN is set, clients have to send it.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from imagereward_jax.command import command
from imagereward_jax.compilation_cache import add_flag, use_compilation_cache
from imagereward_jax.terminal import Parser, program, say

GRACE_SECONDS = 60.0  # for clients whose requests were accepted
MEGABYTE = 2**20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from imagereward_jax.bulk_scoring.flags import add_scorer_flags

    parser = Parser(
        prog=program("serve"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reward", required=True, help="any model that `score` takes: a name, a path, module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8765, help="0 for any free one")
    parser.add_argument("--max-body", type=int, default=64, metavar="MB", help="largest request, in MiB")
    parser.add_argument("--max-pixels", type=int, default=4096 * 4096, help="largest image, width x height")
    parser.add_argument("--max-queue", type=int, default=1024, help="images that may wait; then clients come again")
    parser.add_argument(
        "--stop-with-parent", action="store_true", help="stop when standard input closes, as when a parent process ends"
    )
    add_scorer_flags(parser)
    add_flag(parser)
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_body", "max_pixels", "max_queue"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} should be at least 1")
    if not 0 <= args.port < 65536:
        parser.error(f"--port {args.port} should be from 0 to 65535")
    return args


def serve(args: argparse.Namespace) -> str:
    """Serves until SIGTERM or Ctrl-C, finishes what was accepted, and returns a line about it.

    Raises:
        ValueError, OSError: the reward cannot be opened, or the address not be bound.
    """
    from imagereward_jax.bulk_scoring.flags import scorer_options
    from imagereward_jax.bulk_scoring.scorers import open_scorer
    from imagereward_jax.rewards.http_client import LOOPBACK, TOKEN_VARIABLE
    from imagereward_jax.serving.batching import Batcher
    from imagereward_jax.serving.scoring import ItemScorer

    token = os.environ.get(TOKEN_VARIABLE) or None
    with _bind(args, token) as server:
        scorer = ItemScorer(open_scorer(args.reward, **scorer_options(args)), args.max_pixels)
        scorer.warm_up()
        batcher = Batcher(scorer, max_queue=args.max_queue)
        about = {"reward": args.reward, "device": scorer.device(), "batch_size": scorer.batch_size}
        with _signals() as stopped:
            server.start(batcher, about)
            host = f"[{args.host}]" if ":" in args.host else args.host
            guard = f"token of {TOKEN_VARIABLE}" if token else "no token"
            say(f"{args.reward} on {about['device']} at http://{host}:{server.server_port} ({guard})")
            if token is None and args.host not in LOOPBACK:
                say(f"warning: anyone who reaches this port may use it: set {TOKEN_VARIABLE}", file=sys.stderr)
            if args.stop_with_parent:
                threading.Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
            stopped.wait()
            left = server.stop(GRACE_SECONDS)
            batcher.close()
    unfinished = f", {left} connections were cut off" if left else ""
    return f"stopped: {batcher.served} images were scored, {batcher.failed} of them without success{unfinished}"


def _bind(args, token):
    """The server, with its port.

    Raises:
        ValueError: the address cannot be bound; says which and why.
    """
    from imagereward_jax.serving.server import Limits, ScoreServer

    reasons = {
        errno.EADDRINUSE: "the port is in use: choose another --port",
        errno.EACCES: "this port needs rights that you do not have: choose one above 1023",
        errno.EADDRNOTAVAIL: "this machine does not have this address",
    }
    try:
        return ScoreServer(args.host, args.port, limits=Limits(args.max_body * MEGABYTE, args.max_queue), token=token)
    except OSError as error:
        raise ValueError(f"{args.host}:{args.port}: {reasons.get(error.errno, error.strerror)}") from error


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C ends the process, see `command`."""
    stopped = threading.Event()
    old = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    use_compilation_cache(args.compilation_cache)
    say(serve(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
