"""The part of the hub's HTTP interface that uploads and downloads of small files use, on loopback."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import huggingface_hub.constants

COMMIT = "1" * 40


class Hub:
    """What was asked of it: repositories {name: whether private}, and files {path: bytes} of commits by message.

    files: {repository: {path: bytes}}, of its main branch.
    """

    def __init__(self):
        self.created, self.commits, self.tokens, self.files = {}, {}, set(), {}

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
        self.files.setdefault(f"{owner}/{name}", {}).update(files)
        return {"commitUrl": f"{self.url}/{owner}/{name}/commit/1", "commitOid": "1", "success": True}

    def get(self, path):
        """(bytes, headers) for a GET or HEAD: what a repository holds, or one of its files; None for others."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name in self.files:
                if parts[4:5] == ["tree"]:
                    found = [
                        {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
                        for file, data in self.files[name].items()
                    ]
                else:
                    found = {"id": name, "sha": COMMIT, "tags": [], "private": False}
                return json.dumps(found).encode(), {"Content-Type": "application/json"}
        elif len(parts) > 4 and parts[2] == "resolve":
            data = self.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if data is not None:
                return data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(data)}"'}
        return None


def _digest(data):
    return hashlib.sha1(data).hexdigest()


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

        def do_GET(self):
            hub.tokens.add(self.headers.get("Authorization"))
            data, headers = hub.get(unquote(self.path.partition("?")[0])) or (b"", {"X-Error-Code": "RepoNotFound"})
            self.send_response(404 if "X-Error-Code" in headers else 200)
            for name, value in {**headers, "Content-Length": len(data)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

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
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
