"""The HTTP server: POST /score and GET /health, with limits on what a client may send."""

import concurrent.futures
import contextlib
import hmac
import json
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from imagereward_jax.serving.batching import Batcher, QueueFull
from imagereward_jax.serving.protocol import BadRequest, answer, read_request
from imagereward_jax.terminal import say

READ_SECONDS = 60.0  # for a whole body
SOCKET_SECONDS = 30.0  # for a piece of a request or answer
LINGER_SECONDS = 10.0  # in which a body that was refused is thrown away, so that its client reads why
MAX_CONNECTIONS = 256


class Limits(NamedTuple):
    """What a request may hold: bytes of its body, and images."""

    body: int
    images: int


class ScoreServer(ThreadingHTTPServer):
    """Takes requests over HTTP; a connection serves one request, in a thread of its own.

    The port is taken at once, so that a busy one is known before a model is loaded, and listened to by `start`.

    Args:
        token: what clients have to send as "Authorization: Bearer TOKEN"; None for no check.

    Raises:
        OSError: the address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, *, limits: Limits, token: str | None = None) -> None:
        self.limits, self.token = limits, token
        self.batcher: Batcher | None = None
        self.about: dict[str, Any] = {}
        self._open, self._closed = 0, threading.Condition()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError:
            self.socket.close()
            raise

    def server_bind(self) -> None:
        """Binds without looking up the host's name, which `HTTPServer` does and which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def start(self, batcher: Batcher, about: dict[str, Any]) -> None:
        """Listens, in a thread. `about` is what the health page says beside its counts."""
        self.batcher, self.about = batcher, about
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="accept", daemon=True).start()

    def stop(self, grace: float) -> int:
        """Accepts nothing more and answers what was accepted; returns the connections open after `grace` seconds."""
        self.shutdown()
        self.server_close()
        with self._closed:
            self._closed.wait_for(lambda: not self._open, grace)
            return self._open

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a connection's thread; beyond `MAX_CONNECTIONS` the client is asked to come again."""
        with self._closed:
            self._open += 1
            full = self._open > MAX_CONNECTIONS
        if not full:
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)
        self._count_closed()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handles a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count_closed()

    def _count_closed(self):
        with self._closed:
            self._open -= 1
            self._closed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in one line what went wrong with a connection, unless its client is just gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            say(f"error: {client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "imagereward-jax", ""
    timeout = SOCKET_SECONDS
    server: ScoreServer

    def do_GET(self):
        if self._allowed() and self._is("/health"):
            batcher = self.server.batcher
            counts = {"queued": batcher.queued, "served": batcher.served, "failed": batcher.failed}
            self._answer(200, {**self.server.about, **counts})

    def do_POST(self):
        if not (self._allowed() and self._is("/score")):
            return
        try:
            length = self._length()
            items = read_request(self._body(length))
            if len(items) > self.server.limits.images:
                raise BadRequest(f"{len(items)} images in one request; at most {self.server.limits.images}", 413)
            self._answer(200, answer(self._results(self.server.batcher.submit(items))))
        except BadRequest as error:
            self._refuse(error.status, str(error))
        except QueueFull:
            self._answer(503, {"error": "the queue is full"})

    def _results(self, futures):
        """Waits for results as long as the client does: one that gave up and comes again is not scored twice.

        Raises:
            ConnectionAbortedError: the client has closed the connection.
        """
        while waiting := concurrent.futures.wait(futures, timeout=1.0).not_done:
            if self._client_is_gone():
                for future in waiting:
                    future.cancel()
                raise ConnectionAbortedError
        return [future.result() for future in futures]

    def _client_is_gone(self):
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def handle_expect_100(self):
        """Refuses a body before it is sent, for clients that ask (curl, for more than a megabyte)."""
        try:
            self._length()
        except BadRequest as error:
            self._answer(error.status, {"error": str(error)})
            return False
        return super().handle_expect_100()

    def _allowed(self):
        token, sent = self.server.token, self.headers.get("Authorization", "")
        if token is None or hmac.compare_digest(sent.encode("latin-1", "replace"), f"Bearer {token}".encode()):
            return True
        self._refuse(401, "the token is missing or another")
        return False

    def _is(self, path):
        if self.path.partition("?")[0] == path:
            return True
        self._refuse(404, "expected POST /score or GET /health")
        return False

    def _length(self):
        """The length of the body.

        Raises:
            BadRequest: it is missing or too large, or the body is said to be no JSON. (A page in a browser may send
                other types to any server, and JSON only where it is allowed to.)
        """
        if self.headers.get_content_type() != "application/json":
            raise BadRequest("expected Content-Type: application/json", 415)
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise BadRequest("expected a Content-Length", 411)
        if len(text) > 18 or int(text) > self.server.limits.body:
            raise BadRequest(
                f"a body of {text[:18]} bytes; at most {self.server.limits.body}: send fewer images per request", 413
            )
        return int(text)

    def _body(self, length):
        deadline, parts = time.monotonic() + READ_SECONDS, []
        while length:
            part = self.rfile.read1(min(length, 1 << 16))
            if not part or time.monotonic() > deadline:
                raise BadRequest("the body ended early, or came too slowly", 408)
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _refuse(self, status, reason):
        """Answers, then throws away what the client still sends: closed at once, it would not read the answer."""
        self._answer(status, {"error": reason})
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            deadline = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < deadline and self.connection.recv(1 << 16):
                pass

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def send_error(self, code, message=None, explain=None):
        """Answers what is not HTTP as this server answers: in JSON."""
        self.request_version = self.protocol_version  # else what looks like HTTP/0.9 gets no status
        self._answer(code, {"error": message or self.responses.get(code, ("error",))[0]})

    def log_message(self, format, *args):
        """Writes no line per request."""
