"""A reward on another machine: images go to a score server over HTTP (docs/serve.md), scores come back."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from imagereward_jax.rewards.errors import RewardError
from imagereward_jax.rewards.functions import SCORE_NAME
from imagereward_jax.rewards.http_client import (
    TOKEN_VARIABLE,
    ScoreClient,
    Scored,
    ServerError,
    ServerUnavailable,
    encode_png,
)
from imagereward_jax.rewards.rules import RuleReward
from imagereward_jax.storage.contact_sheet import to_uint8
from imagereward_jax.terminal import say

ON_ERROR = ("error", "nan")


def is_url(name: Any) -> bool:
    """Whether a reward's name is the URL of a server."""
    return re.match("https?://", str(name)) is not None


class RemoteReward(RuleReward):
    """Scores of a server, `imagereward_jax.serve` or any that speaks its protocol; no gradient.

    Images are sent as PNG, so the server sees the pixels that are scored here.

    Args:
        url: "http://host:port".
        token: the environment variable with the server's token.
        on_error: "error" raises if a row has no score; "nan" gives it no verdict, and stderr says how many there were.
        timeout: seconds that the server may take for a batch.
        patience: seconds without any answer after which it is given up, as when it restarts.
        batch_size: images per request.

    Raises:
        ValueError: the URL or a setting is not valid, or the named environment variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = TOKEN_VARIABLE,
        on_error: str = "error",
        timeout: float = 60.0,
        patience: float = 300.0,
        batch_size: int = 16,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        secret = os.environ.get(token)
        if secret is None and token != TOKEN_VARIABLE:
            raise ValueError(f"the environment variable {token!r}, which should hold the server's token, is not set")
        self.name, self.on_error, self.batch_size = url, on_error, batch_size
        self._client = ScoreClient(url, token=secret, timeout=timeout, patience=patience, batch_size=batch_size)

    def check(self) -> None:
        """Asks for the health page, so that a run without its server ends before anything is compiled.

        Raises:
            ValueError: the server does not answer, or refuses the token. One without such a page passes.
        """
        try:
            self._client.health()
        except ServerUnavailable as error:
            hint = "start it (imagereward serve --reward NAME), or mend the address"
            raise ValueError(f"{error}; {hint}") from error
        except ServerError as error:
            if error.status in (401, 403):
                raise ValueError(str(error)) from error

    def score_arrays(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """See `RuleReward.score_arrays`.

        Raises:
            RewardError: the server refused, did not answer within the patience, or a row has no score.
        """
        return self.named_scores(images, prompts, metadata)[""]

    def named_scores(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, np.ndarray]:
        """See `RuleReward.named_scores`."""
        return self._scores(to_uint8(images), prompts, metadata)

    def score_prepared(self, prompts: Sequence[str], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """See `RuleReward.score_prepared`: in one request per `batch_size` images, whatever their sizes."""
        return self._scores(pixels, prompts, None)[""]

    def _scores(self, images, prompts, metadata):
        with ThreadPoolExecutor() as pool:
            encoded = list(pool.map(lambda image: encode_png(Image.fromarray(image)), images))
        try:
            scored = self._client.score(encoded, list(prompts), metadata and list(metadata))
        except (ServerError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}", str(error)) from error
        self._check(scored)
        odd = [name for name in scored.named if not SCORE_NAME.fullmatch(name)]
        if odd:
            reason = f"the server named a score {odd[0]!r:.50}; expected letters, digits, _ and -"
            raise RewardError(f"reward {self.name!r}", reason)
        columns = {"": scored.scores, **scored.named}
        return {name: np.array(values, np.float32) for name, values in columns.items()}  # None becomes NaN

    def _check(self, scored: Scored) -> None:
        """Applies `on_error`."""
        failed = [(row, error) for row, error in enumerate(scored.errors) if error is not None]
        if not failed:
            return
        reason = f"{len(failed)} of {len(scored.errors)} images have no score; image {failed[0][0]}: {failed[0][1]}"
        if self.on_error == "error":
            raise RewardError(f"reward {self.name!r}", reason)
        say(f"warning: reward {self.name!r}: {reason}", file=sys.stderr)
