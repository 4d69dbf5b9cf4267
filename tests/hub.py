"""A loopback server that speaks as much of the Hub's protocol as downloads need."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LoopbackHub:
    """Serves folders as model repositories; `url` is what HF_ENDPOINT takes.

    `org/gated` is gated, `org/unreachable` drops every connection, and any name that was not
    published does not exist.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(self.path)
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, name: str, folder: Path) -> str:
        """Serve a folder as the repository `name`."""
        self.repositories[name] = folder
        return name

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        name = "/".join(parts[:2])
        if name == "org/unreachable":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if name == "org/gated":
            self.refuse(request, 403, "GatedRepo")
            return
        if name not in self.repositories:
            self.refuse(request, 404, "RepoNotFound")
            return
        revision = parts[3] if len(parts) > 3 else "main"
        if revision not in ("main", COMMIT):
            self.refuse(request, 404, "RevisionNotFound")
            return
        folder = self.repositories[name]
        if is_api:
            self.send(request, self.listing(name, folder, tree="tree" in parts))
            return
        path = folder.joinpath(*parts[4:])
        if not path.is_file():
            self.refuse(request, 404, "EntryNotFound")
            return
        self.send(request, path.read_bytes())

    def listing(self, name: str, folder: Path, *, tree: bool) -> bytes:
        """Repository information, or the list of its files."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if tree:
            entries = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in files
            ]
            return json.dumps(entries).encode()
        siblings = [{"rfilename": path.name} for path in files]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()

    def send(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        """Answer 200 with a body; HEAD gets the headers only. A byte range is honoured."""
        etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        total, first = len(body), 0
        wanted = request.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first = int(start)
            body = body[first : int(end) + 1 if end else None]
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(body)))
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        request.send_header("ETag", f'"{etag}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        """Answer with one of the Hub's error codes."""
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()
