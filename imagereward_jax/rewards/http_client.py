"""Client of a score server (docs/serve.md): the standard library alone, and Python 3.9 or later.

`rewards.remote` is built on it, and programs with pins of their own carry a copy of this file, so it imports nothing of
this package. `LocalServer` starts a server from an environment of its own.
"""

from __future__ import annotations

import atexit
import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import math
import os
import random
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

TOKEN_VARIABLE = "IMAGEREWARD_TOKEN"  # the environment variable with the token, of servers and clients
PYTHON_FILE = "imagereward_python.txt"  # beside copies of this file: the Python that starts a server
DEFAULT_URL = "http://127.0.0.1:8765"
RETRIED = (429, 502, 503, 504)  # busy, or a proxy whose server is away
LONGEST_WAIT = 5.0  # seconds between two tries
MAX_ANSWER = 64 * 2**20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DAY = 86_400.0  # seconds; no wait is longer
START_SECONDS = 900.0  # for a server that downloads and compiles


class ServerError(RuntimeError):
    """The server refused a request or does not speak the protocol; the message says why, and trying again is no use.

    Attributes:
        status: of HTTP, or None.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerUnavailable(ServerError):
    """The server cannot be reached, or is too busy."""


class Scored(NamedTuple):
    """Rows of a request, in its order.

    Attributes:
        scores: a number per image; None for no verdict, and where there is an error.
        named: {name: further scores}.
        errors: why a row has no score, or None.
    """

    scores: list[float | None]
    named: dict[str, list[float | None]]
    errors: list[str | None]


class ScoreClient:
    """Scores images on a server; thread-safe.

    Args:
        url: "http://host:port" or "https://host:port/prefix".
        token: sent as "Authorization: Bearer TOKEN" if given.
        timeout: seconds that the server may take for a step of an answer.
        patience: seconds without any answer after which a request is given up; 0 tries once.
        batch_size: images per request. connections: requests at a time.

    Raises:
        ValueError: the URL or a number is not valid.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        patience: float = 0.0,
        batch_size: int = 16,
        connections: int = 4,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            port, odd = parts.port, parts.query or parts.fragment
        except ValueError:  # not a number of a port
            port, odd = None, True
        if parts.scheme not in ("http", "https") or not parts.hostname or odd:
            raise ValueError(f"{url!r} is not the URL of a server; expected http://host:port or https://host:port")
        if parts.username or parts.password:
            raise ValueError(f"the URL of {parts.hostname} holds a password: put a token into an environment variable")
        if not 0 < timeout <= DAY or not 0 <= patience <= DAY or batch_size < 1 or connections < 1:
            raise ValueError(
                f"expected 0 < timeout <= {DAY:g}, 0 <= patience <= {DAY:g}, batch_size >= 1 and connections >= 1"
            )
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("the token has characters that no HTTP header can carry")
        self.url, self.host, self.port = url, parts.hostname, port
        self._secure, self._prefix = parts.scheme == "https", parts.path.rstrip("/")
        self.token, self.timeout, self.patience = token, timeout, patience
        self.batch_size, self.connections = batch_size, connections
        self._answered = -math.inf

    def health(self) -> dict[str, Any]:
        """What the server says of itself, asked once: reward, device, queued, served, ...

        Raises:
            ServerUnavailable, ServerError.
        """
        return self._once("GET", "/health", None)

    def score(
        self,
        images: Sequence[bytes],
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scored:
        """Scores encoded images (PNG, JPEG, ...) for their prompts, in order.

        A request that finds no server within the patience costs its rows: each has an error, and no score.

        Raises:
            ServerError: the server refuses such requests, or its answer is not of the protocol.
            ValueError: there are not as many prompts or metadata as images; metadata cannot be written as JSON.
        """
        if len(prompts) != len(images) or len(metadata or images) != len(images):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts, {len(metadata or images)} metadata")
        started = time.monotonic()
        chunks = [slice(first, first + self.batch_size) for first in range(0, len(images), self.batch_size)]

        def ask(rows):
            return self._ask(images[rows], prompts[rows], metadata and metadata[rows], started)

        if len(chunks) == 1:
            return ask(chunks[0])
        with concurrent.futures.ThreadPoolExecutor(self.connections) as pool:
            return _join(list(pool.map(ask, chunks)))

    def score_images(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """Scores PIL images for their prompts; NaN for no verdict.

        Raises:
            ServerError: an image has no score, or see `score`.
        """
        scored = self.score([encode_png(image) for image in images], prompts)
        for number, error in enumerate(scored.errors):
            if error is not None:
                raise ServerError(f"image {number} of {len(images)} has no score: {error}")
        return [math.nan if score is None else score for score in scored.scores]

    def _ask(self, images, prompts, metadata, started):
        """Scores one request, with retries."""
        body = {"images": [base64.b64encode(image).decode() for image in images], "prompts": list(prompts)}
        if metadata is not None:
            body["metadata"] = [dict(row) for row in metadata]
        try:
            body = json.dumps(body, default=_plain).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata cannot be written as JSON: {error}") from error
        wait = 0.1
        while True:
            try:
                answer = self._once("POST", "/score", body)
                self._answered = time.monotonic()
                return _read_answer(answer, len(images), self.url)
            except ServerUnavailable as error:
                # Patience counts from the last answer to anybody, so that requests do not wait one after the other.
                if time.monotonic() + wait > max(started, self._answered) + self.patience:
                    return Scored([None] * len(images), {}, [str(error)] * len(images))
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT)

    def _once(self, method, path, body):
        """One request on a connection of its own: the JSON of its answer."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        headers = {"Connection": "close", **({"Content-Type": "application/json"} if body is not None else {})}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            # A body that is refused is answered before all of it is read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._prefix + path, body, headers)
            response = connection.getresponse()
            status, text = response.status, response.read(MAX_ANSWER + 1)
        except ssl.SSLCertVerificationError as error:
            raise ServerError(f"{self.url}: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnavailable(f"{self.url} does not answer ({error or type(error).__name__})") from error
        finally:
            connection.close()
        return self._checked(status, text)

    def _checked(self, status, text):
        try:
            if len(text) > MAX_ANSWER:
                raise ValueError
            answer = json.loads(text)
            if not isinstance(answer, dict):
                raise ValueError
        except (ValueError, RecursionError):
            answer = None
        reason = f"{http.client.responses.get(status, 'status')} {status}"
        said = answer.get("error") if answer else None
        said = f"{self.url}: {said if isinstance(said, str) else reason}"
        if status in RETRIED:
            raise ServerUnavailable(said, status)
        if status == 401:
            raise ServerError(
                f"{said}; set the environment variable with its token, by default {TOKEN_VARIABLE}", status
            )
        if status != 200:
            raise ServerError(said, status)
        if answer is None:
            raise ServerError(f"{self.url} answered something that is not a JSON object")
        return answer


def encode_png(image: Any) -> bytes:
    """A PIL image as the bytes of a PNG, which keeps every pixel."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _plain(value):
    """Numbers and arrays of NumPy as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r:.50}")


def _read_answer(answer, count, url):
    """Checks an answer row by row; see docs/serve.md."""

    def column(values, what, kinds):
        if not isinstance(values, list) or len(values) != count:
            raise ServerError(f"{url} answered without a list {what!r} of {count}, one for each image")
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                raise ServerError(f"{url} answered {value!r:.50} in {what!r}")
        return values

    def numbers(values, what):
        found = [None if value is None else float(value) for value in column(values, what, (int, float))]
        if any(value is not None and math.isinf(value) for value in found):
            raise ServerError(f"{url} answered an infinite number in {what!r}")
        return [None if value is None or math.isnan(value) else value for value in found]

    named = answer.get("named") or {}
    if not isinstance(named, dict):
        raise ServerError(f"{url} answered {type(named).__name__} as 'named'; expected an object of lists")
    errors = answer.get("errors")
    return Scored(
        numbers(answer.get("scores"), "scores"),
        {name: numbers(values, f"named.{name}") for name, values in named.items()},
        [None] * count if errors is None else column(errors, "errors", str),
    )


def _join(parts):
    """Puts chunks together; a name that a chunk lacks has no verdict there."""
    names = dict.fromkeys(name for part in parts for name in part.named)
    named = {
        name: [value for part in parts for value in part.named.get(name, [None] * len(part.scores))] for name in names
    }
    scores, errors = ([value for part in parts for value in part[field]] for field in (0, 2))
    return Scored(scores, named, errors)


def installed_python() -> str:
    """The Python that `python -m imagereward_jax.integrations` wrote beside this file, or ""."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), PYTHON_FILE)
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


class LocalServer:
    """A server on this machine that is started on request, from an environment of its own, and ends with this program.

    Attributes:
        process: the server, if this program started one.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        self._log: Any = None

    def connect(
        self, url: str, reward: str = "", *, python: str = "", device: str = "default", timeout: float = 600.0
    ) -> ScoreClient:
        """Finds the server at `url`; starts it if nobody answers there and `python` is given.

        Args:
            reward: what it has to serve, a name or path; "" for whatever it serves.
            python: the Python of an environment with imagereward-jax.
            device: "default" or "cpu", of a server that is started.
            timeout: seconds, as of `ScoreClient`.

        Raises:
            ServerError: there is no server and none can be started, or it serves something else.
        """
        url, reward, python = url.strip() or DEFAULT_URL, reward.strip(), python.strip()
        reward = os.path.abspath(reward) if os.path.exists(reward) else reward
        client = ScoreClient(url, token=os.environ.get(TOKEN_VARIABLE), timeout=timeout)
        with self._lock:
            served = self._served(client)
            if served is not None and reward and served != reward:
                if self.process is None:
                    raise ServerError(f"{url} serves {served}, not {reward}: name that one, or the URL of another")
                self._stop()
                served = None
            if served is None:
                self._start(client, reward, python, device)
        return client

    def stop(self) -> str:
        """Stops the server if this program started it; returns a message for the user."""
        with self._lock:
            return self._stop()

    def _served(self, client):
        """The reward that is served; None if nobody answers."""
        try:
            return str(client.health().get("reward", ""))
        except ServerUnavailable:
            return None

    def _stop(self):
        if self.process is None:
            return "No server was started here."
        atexit.unregister(self.stop)
        process, self.process = self.process, None
        process.terminate()
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()
        return "The server is stopped."

    def _start(self, client, reward, python, device):
        command = f"-m imagereward_jax.serve --reward {reward or 'NAME'} --port {client.port or 80}"
        if not python or not reward:
            way_out = "name the Python of the environment that has imagereward-jax, and the reward"
            raise ServerError(f"no server at {client.url}: start one there (python {command}), or {way_out}")
        if client.host not in LOOPBACK or client._secure:
            raise ServerError(f"no server at {client.url}; only one at http://127.0.0.1:PORT can be started from here")
        if self.process is not None:
            self._stop()
        # What steers the host's own Python must not steer the server's.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the host's model is on the same device
        if device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        arguments = [python, "-m", "imagereward_jax.serve", "--reward", reward]
        arguments += ["--host", client.host, "--port", str(client.port or 80), "--stop-with-parent"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the server runs
        try:
            self.process = subprocess.Popen(
                arguments,
                env=environment,
                cwd=os.path.expanduser("~"),
                stdin=subprocess.PIPE,  # closes when this program ends, however it ends
                stdout=self._log,
                stderr=self._log,
            )
        except OSError as error:
            self._log.close()
            raise ServerError(f"{python}: {error.strerror}; expected the Python of imagereward-jax") from error
        atexit.register(self.stop)
        self._wait_until_ready(client)

    def _wait_until_ready(self, client):
        deadline = time.monotonic() + START_SECONDS
        while self._served(client) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                lines = self._log.read().decode(errors="replace").strip().splitlines() or ["no message"]
                self._stop()
                raise ServerError(f"the server at {client.url} did not start: {lines[-1]}")
            time.sleep(0.2)
