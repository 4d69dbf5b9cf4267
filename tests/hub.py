# SPDX-License-Identifier: Apache-2.0
"""A loopback server that speaks the Hub's protocol: downloads, and uploads by commit and LFS."""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of every published folder."""
USER, TOKEN, EXPIRED = "org", "hf_" + "v" * 34, "hf_" + "x" * 34
LFS = (".safetensors", ".png")


def git_oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """Revisions, each a commit and its files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """Name of a branch or pull request to its commit."""

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, files: dict[str, bytes], oid: str | None = None) -> str:
        """Let a branch have these files."""
        oid = oid or hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class Fault:
    """What goes wrong with the next requests of this method whose path matches."""

    method: str
    path: str
    status: int = 0
    """Answer this; 0 breaks the connection in the middle of the request's body."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    broken: int = 0
    """How often it has happened."""


class LoopbackHub:
    """Serves repositories; `url` is what HF_ENDPOINT takes.

    `org/gated` is gated, `org/unreachable` drops every connection, and any name that was neither
    published nor created does not exist. Only `TOKEN`, of the user `org`, may write.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(self.path)
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self.reset()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.spoiled = ""
        """A file that arrives with one byte too many."""
        self.requests.clear()

    def publish(self, name: str, folder: Path) -> str:
        """Serve the files of a folder as the repository `name`; `datasets/...` is a data set."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository()
        self.repositories[name].commit("main", files, COMMIT)
        return name

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = unquote(urlsplit(request.path).path).strip("/")
        if path.startswith("org/unreachable") or path.startswith("api/models/org/unreachable"):
            self.hang_up(request)
            return
        if self.fails(request, path):
            return
        body = self.body_of(request)
        asks = "/paths-info/" in path  # the one POST that reads
        if (request.command in ("POST", "PUT") and not asks) or path == "api/whoami-v2":
            given = request.headers.get("Authorization", "")
            if not path.startswith("lfs/") and given != f"Bearer {TOKEN}":
                self.refuse(request, 401, "", "Invalid credentials in Authorization header")
                return
            self.answer_user(request, path, body)
            return
        is_api = path.startswith("api/")
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        length = 3 if parts[0] == "datasets" else 2
        name, parts = "/".join(parts[:length]), parts[length:]
        if name == "org/gated":
            self.refuse(request, 403, "GatedRepo")
        elif name not in self.repositories or (
            self.repositories[name].private
            and request.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            self.refuse(request, 404, "RepoNotFound")
        elif "discussions" in parts:
            self.send_json(request, self.discussion(name, int(parts[1])))
        elif asks:
            files = self.repositories[name].files(parts[1])
            wanted = json.loads(body)["paths"]
            self.send_json(request, [self.entry(it, files[it]) for it in wanted if it in files])
        else:
            self.answer_download(request, name, parts, is_api)

    def answer_download(
        self, request: BaseHTTPRequestHandler, name: str, parts: list[str], is_api: bool
    ) -> None:
        """A file, the list of files, or information on the repository."""
        repository = self.repositories[name]
        rest = "/".join(parts[1:]) or "main"
        known = [*repository.branches, *repository.commits]
        revision = next((it for it in known if rest == it or rest.startswith(it + "/")), None)
        if revision is None:
            self.refuse(request, 404, "RevisionNotFound")
            return
        files = repository.files(revision)
        oid = repository.branches.get(revision, revision)
        path = rest.removeprefix(revision).strip("/")
        if is_api and parts[:1] == ["tree"]:
            self.send_json(request, self.listing(files, path, "recursive=false" in request.path))
        elif is_api:
            siblings = [{"rfilename": path} for path in sorted(files)]
            told = {"id": name, "sha": oid, "siblings": siblings, "private": repository.private}
            self.send_json(request, told)
        elif path not in files:
            self.refuse(request, 404, "EntryNotFound")
        else:
            self.send(request, files[path], oid)

    def listing(self, files: dict[str, bytes], path: str, flat: bool) -> list[dict[str, object]]:
        """The files below a folder, or, flat, its files and folders."""
        inside = [it for it in sorted(files) if not path or it.startswith(path + "/")]
        if not flat:
            return [self.entry(it, files[it]) for it in inside]
        depth = len(path.split("/")) if path else 0
        folders = {"/".join(it.split("/")[: depth + 1]) for it in inside} - set(inside)
        entries = [self.entry(it, files[it]) for it in inside if it.count("/") == depth]
        told = {"type": "directory", "size": 0, "oid": COMMIT}
        return [{**told, "path": it} for it in sorted(folders)] + entries

    @staticmethod
    def entry(path: str, content: bytes) -> dict[str, object]:
        """A file in a listing."""
        told = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LFS):
            sha256 = hashlib.sha256(content).hexdigest()
            told["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return told

    def answer_user(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        """What needs a token."""
        if path == "api/whoami-v2":
            self.send_json(request, {"name": USER, "type": "user", "orgs": []})
            return
        if path.startswith("lfs/"):
            oid = path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() != oid:
                self.refuse(request, 400, "", "the content is not what was announced")
                return
            self.large[oid] = body
            self.send(request, b"")
            return
        if path == "api/validate-yaml":
            self.send_json(request, {"errors": [], "warnings": []})
            return
        asked = [json.loads(line) for line in body.splitlines()] or [{}]
        if path == "api/repos/create":
            self.create(request, asked[0])
            return
        name = re.sub(r"^api/models/|\.git/info/.*$", "", path)
        name, verb = "/".join(name.split("/")[:2]), path.removeprefix("api/models/").split("/")[2]
        if not name.startswith(USER + "/"):
            self.refuse(request, 403, "", f"you have no rights in {name}")
        elif name not in self.repositories:
            self.refuse(request, 404, "RepoNotFound")
        else:
            self.answer_writer(request, name, verb, "/".join(path.split("/")[5:]), asked)

    def create(self, request: BaseHTTPRequestHandler, asked: dict) -> None:
        """A new repository."""
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(USER + "/"):
            self.refuse(request, 403, "", f"you have no rights in {name}")
        elif name in self.repositories:
            self.refuse(request, 409, "", "You already created this model repo")
        else:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.repositories[name] = Repository(private=private)
            self.repositories[name].commit("main", {".gitattributes": b"*.safetensors lfs\n"})
            self.send_json(request, {"url": f"{self.url}/{name}", "name": name})

    def answer_writer(
        self,
        request: BaseHTTPRequestHandler,
        name: str,
        verb: str,
        revision: str,
        asked: list[dict],
    ) -> None:
        """What changes a repository."""
        repository = self.repositories[name]
        if verb == "info":  # of LFS
            objects = []
            for large in asked[0]["objects"]:
                href = f"{self.url}/lfs/{large['oid']}"
                known = large["oid"] in self.large
                objects.append(
                    {**large, **({} if known else {"actions": {"upload": {"href": href}}})}
                )
            self.send_json(request, {"transfer": "basic", "objects": objects})
        elif verb == "branch":
            if revision in repository.branches:
                self.refuse(request, 409, "", "Reference already exists")
                return
            repository.branches[revision] = repository.branches["main"]
            self.send_json(request, {})
        elif verb == "discussions":
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            repository.branches[f"refs/pr/{number}"] = repository.branches["main"]
            self.send_json(request, {"num": number})
        elif revision not in repository.branches:
            self.refuse(request, 404, "RevisionNotFound")
        elif verb == "preupload":
            files = repository.files(revision)
            self.send_json(
                request, {"files": [self.mode(it["path"], files) for it in asked[0]["files"]]}
            )
        elif verb == "commit":
            oid = self.apply(repository, revision, asked)
            told = {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
            self.send_json(request, {"success": True, **told})

    @staticmethod
    def mode(path: str, files: dict[str, bytes]) -> dict[str, object]:
        """How a file is to be sent, and what it is now."""
        mode, oid = "regular", git_oid
        if path.endswith(LFS):
            mode, oid = "lfs", lambda content: hashlib.sha256(content).hexdigest()
        told = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        return {**told, "oid": oid(files[path]) if path in files else None}

    def apply(self, repository: Repository, branch: str, lines: list[dict]) -> str:
        """Make a commit of its lines."""
        files = dict(repository.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if self.spoiled in files:
            files[self.spoiled] += b" "
        return repository.commit(branch, files)

    def discussion(self, name: str, number: int) -> dict[str, object]:
        """A pull request as the Hub tells of it."""
        return {
            "num": number,
            "title": "",
            "author": {"name": USER},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "draft",
            "repo": {"name": name, "type": "model"},
            "isPullRequest": True,
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": False,
            "events": [],
        }

    def fails(self, request: BaseHTTPRequestHandler, path: str) -> bool:
        """Do what the first matching fault says, if there is one."""
        for fault in self.faults:
            matching = fault.method == request.command and re.search(fault.path, path)
            if not matching or fault.broken >= fault.times:
                continue
            fault.broken += 1
            if fault.status:
                self.body_of(request)
                self.refuse(request, fault.status, "", "for a test", **fault.headers)
            else:
                request.rfile.read(int(request.headers.get("Content-Length", 2)) // 2)
                self.hang_up(request)
            return True
        return False

    @staticmethod
    def hang_up(request: BaseHTTPRequestHandler) -> None:
        """Break the connection."""
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def body_of(request: BaseHTTPRequestHandler) -> bytes:
        """The body of a request, sent whole or in chunks."""
        if request.headers.get("Transfer-Encoding") != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length", 0)))
        body = b""
        while size := int(request.rfile.readline(), 16):
            body += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return body

    def send_json(self, request: BaseHTTPRequestHandler, content: object) -> None:
        """Answer 200 with JSON."""
        self.send(request, json.dumps(content).encode())

    def send(self, request: BaseHTTPRequestHandler, body: bytes, commit: str = COMMIT) -> None:
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
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def refuse(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        code: str,
        message: str = "",
        **headers: str,
    ) -> None:
        """Answer with one of the Hub's error codes."""
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message or code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()
