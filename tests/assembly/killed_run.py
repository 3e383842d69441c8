"""`imagereward_jax.train` that signals itself at a call of a place: killed_run.py PLACE CALL SIGNAL ARGUMENTS..."""

import itertools
import os
import signal
import sys

from imagereward_jax.rewards.mixed import Terms
from imagereward_jax.train import main
from imagereward_jax.training import loop
from imagereward_jax.training.checkpoints import Checkpoints
from imagereward_jax.training.explore import Explore

PLACES = {
    "rollout": (Explore, "_collect"),  # the devices sample the round that it waits for, or the one after it
    "reward": (Terms, "call_function"),  # in the function's thread
    "batch": (loop, "put_batch"),  # before an update
    "save": (Checkpoints, "save"),  # the checkpoint is being written in the background
}


def signal_at(place, call, number):
    """Sends this process a signal at a call, counted from 1, of a place."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def watched(*arguments, **options):
        now = next(calls) == call
        if now and place != "save":
            os.kill(os.getpid(), number)
        result = original(*arguments, **options)
        if now and place == "save":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, watched)


if __name__ == "__main__":
    place, call, number, *arguments = sys.argv[1:]
    if place != "never":
        signal_at(place, int(call), signal.Signals[number])
    sys.exit(main(["train", *arguments]))
