"""The part of the hub's HTTP interface that uploads use, on loopback: repositories and commits of small files."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants


class Hub:
    """What was asked of it: repositories {name: whether private}, and files {path: bytes} of commits by message."""

    def __init__(self):
        self.created, self.commits, self.tokens = {}, {}, set()

    def answer(self, path, body):
        """JSON for a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.created[name] = asked.get("visibility") == "private"
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        lines = [json.loads(line) for line in body.splitlines()]
        files = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines[1:]}
        self.commits[lines[0]["value"]["summary"]] = files
        owner, name = path.split("/")[3:5]
        return {"commitUrl": f"{self.url}/{owner}/{name}/commit/1", "commitOid": "1", "success": True}


@contextlib.contextmanager
def serve(monkeypatch):
    """A `Hub` that the hub library talks to instead of the real one."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
            answer = json.dumps(hub.answer(self.path.partition("?")[0], body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def _chunks(self):
            parts = []
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
