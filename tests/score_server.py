"""Score servers on loopback, in this process: the package's, and a foreign one of the standard library alone."""

import base64
import contextlib
import http.server
import io
import json
import threading

import numpy as np
from PIL import Image

from imagereward_jax.serving.batching import Batcher
from imagereward_jax.serving.scoring import ItemScorer
from imagereward_jax.serving.server import Limits, ScoreServer

PIXELS = 4096 * 4096


@contextlib.contextmanager
def serving(scorer, reward="tested", *, port=0, token=None, body=2**20, images=64, pixels=PIXELS):
    """Serves a scorer; yields the server, with its `url`."""
    server = ScoreServer("127.0.0.1", port, limits=Limits(body, images), token=token)
    batcher = Batcher(ItemScorer(scorer, pixels), max_queue=images)
    server.start(batcher, {"reward": reward, "device": "host", "batch_size": scorer.batch_size})
    server.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield server
    finally:
        assert server.stop(10) == 0
        batcher.close()


@contextlib.contextmanager
def foreign(answer):
    """A server of others: `answer(request)` gives (status, bytes), or None to hang up; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if answered := answer(request):
                status, body = answered
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def brightness(encoded):
    """The mean of an image in base64, as a foreign server computes it."""
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).mean())


def grey(value, size=8):
    """The PNG of a grey image."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value,) * 3).save(file, "PNG")
    return file.getvalue()
