"""The error of a reward that gave no scores."""

import inspect
import os
import traceback
from collections.abc import Callable
from typing import Any


class RewardError(RuntimeError):
    """A reward gave no scores.

    Args:
        where: names the reward, e.g. "config.reward.path='my_rewards:sharp'".
        reason: what went wrong, for one line.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def describe(error: Exception, function: Callable[..., Any]) -> str:
    """Describes an error that a user's function raised: its type, first line and last place in the function's file."""
    text = str(error).strip()
    told = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    function = inspect.unwrap(getattr(function, "func", function))  # of a functools.partial, of jax.jit
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    return f"{told} ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else told
