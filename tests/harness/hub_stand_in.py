"""A stand-in for the Hugging Face hub on loopback: the few endpoints that files come and go by, over folders.

It speaks for files as the hub does: SHA-256 for those of LFS (here: .pt, .ckpt and .safetensors), git's SHA-1 for the
others, ranges, and a commit for a revision. Everything it is asked is kept in `asked`. What is uploaded goes into the
folder of its repository, all of it as ordinary files.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".pt", ".ckpt", ".safetensors")


class HubStandIn:
    """repositories: "owner/name" -> folder. Use as a context; `address` is what HF_ENDPOINT should be."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.asked: list[tuple[str, str, str | None]] = []
        """(method, path, range)"""
        self.tokens: set[str | None] = set()
        self.cut: dict[str, int] = {}
        """file's path -> bytes after which its next answer breaks off"""
        self.lies: dict[str, bytes] = {}
        """file's path -> content that is served instead of the described one"""
        self.creates: Path | None = None
        """where repositories that are asked for are made; None: nobody may make any"""

    def __enter__(self) -> "HubStandIn":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.asked.append((request.command, path, request.headers.get("Range")))
        self.tokens.add(request.headers.get("Authorization"))
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if path == "api/repos/create" and self.creates is not None:
            name = "/".join(json.loads(body)[part] for part in ("organization", "name"))
            self.repositories.setdefault(name, self.creates / name).mkdir(parents=True, exist_ok=True)
            return send(request, {"url": f"{self.address}/{name}", "name": name, "id": name})
        if path == "api/validate-yaml":
            return send(request, {"errors": [], "warnings": []})
        for name, folder in self.repositories.items():
            api = f"api/models/{name}"
            if path == api or path.startswith(f"{api}/revision/"):
                return send(request, {"id": name, "modelId": name, "sha": COMMIT, "tags": [], "siblings": []})
            if path == f"{api}/paths-info/{COMMIT}":
                asked = parse_qs(body.decode())["paths"]
                return send(request, [describe(folder, p) for p in asked if (folder / p).is_file()])
            if path.startswith(f"{api}/tree/{COMMIT}/"):
                below = folder / path.removeprefix(f"{api}/tree/{COMMIT}/")
                files = sorted(p for p in below.glob("*") if p.is_file())
                return send(request, [describe(folder, str(p.relative_to(folder))) for p in files])
            if path == f"{api}/preupload/main":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for f in json.loads(body)["files"]]  # fmt: skip
                return send(request, {"files": files})
            if path == f"{api}/commit/main":
                write_commit(folder, body.decode())
                return send(request, {"success": True, "commitOid": COMMIT, "hookOutput": "",
                                      "commitUrl": f"{self.address}/{name}/commit/{COMMIT}"})  # fmt: skip
            for revision in (COMMIT, "main"):
                prefix = f"{name}/resolve/{revision}/"
                if path.startswith(prefix) and (folder / path.removeprefix(prefix)).is_file():
                    return self.send_file(request, folder, path.removeprefix(prefix))
            if path.startswith(f"{name}/resolve/"):
                return send(request, {"error": "Entry not found"}, 404, ("X-Error-Code", "EntryNotFound"))
        return send(request, {"error": "Repository not found"}, status=404, header=("X-Error-Code", "RepoNotFound"))

    def send_file(self, request: BaseHTTPRequestHandler, folder: Path, path: str) -> None:
        content = self.lies.get(path) or (folder / path).read_bytes()
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        request.send_response(206 if request.headers.get("Range") else 200)
        request.send_header("Content-Length", str(len(content) - start))
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", COMMIT)
        if request.headers.get("Range"):
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        end = self.cut.pop(path, len(content))
        request.wfile.write(content[start:end])
        if end < len(content):  # the connection breaks
            request.wfile.flush()
            request.close_connection = True
            self.broke()

    def broke(self) -> None:
        """Called where an answer breaks off; a test may end the hub here."""


def write_commit(folder: Path, lines: str) -> None:
    """Puts the files of a commit into a repository's folder."""
    for line in map(json.loads, lines.splitlines()):
        if line["key"] == "file":
            path = folder / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(line["value"]["content"]))


def send(request: BaseHTTPRequestHandler, answer: object, status: int = 200, header: tuple | None = None) -> None:
    content = json.dumps(answer).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(content)))
    if header:
        request.send_header(*header)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def describe(folder: Path, path: str) -> dict:
    """A file as the hub lists it."""
    content = (folder / path).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
