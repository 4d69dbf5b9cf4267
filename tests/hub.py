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


class LoopbackHub:
    """Serves repositories; `url` is what HF_ENDPOINT takes.

    `org/gated` is gated, `org/unreachable` drops every connection, and any name that was neither
    published nor created does not exist. Only `TOKEN`, of the user `org`, may write.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.reset()
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self})
        )
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


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def do_GET(self) -> None:
        """Dispatch a request of any method."""
        self.hub.requests.append(self.path)
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.removeprefix("api/models/").startswith("org/unreachable"):
            self.hang_up()
            return
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                self.fail(fault.status)
                return
        body = self.body()
        writes = self.command in ("POST", "PUT") and "/paths-info/" not in path
        permitted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("lfs/"):
            self.store(path.removeprefix("lfs/"), body)
        elif not writes and path != "api/whoami-v2":
            self.read(path, body, permitted)
        elif not permitted:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif path in ("api/whoami-v2", "api/validate-yaml"):
            self.send_json({"name": USER, "type": "user", "orgs": [], "errors": [], "warnings": []})
        else:
            self.write(path, [json.loads(line) for line in body.splitlines()] or [{}])

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def read(self, path: str, body: bytes, permitted: bool) -> None:
        """Send a file, a list of files, or information on a repository."""
        is_api = path.startswith("api/")
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        length = 3 if parts[0] == "datasets" else 2
        name, (verb, *rest) = "/".join(parts[:length]), [*parts[length:], ""]
        repository = self.hub.repositories.get(name)
        if name == "org/gated":
            self.refuse(403, "GatedRepo")
            return
        if repository is None or (repository.private and not permitted):
            self.refuse(404, "RepoNotFound")
            return
        place = "/".join(rest).strip("/") or "main"
        known = [*repository.branches, *repository.commits]
        revision = next((it for it in known if place == it or place.startswith(it + "/")), None)
        if revision is None:
            self.refuse(404, "RevisionNotFound")
            return
        files, oid = repository.files(revision), repository.branches.get(revision, revision)
        path = place.removeprefix(revision).strip("/")
        if verb == "paths-info":
            self.send_json(
                [entry(it, files[it]) for it in json.loads(body)["paths"] if it in files]
            )
        elif verb == "tree":
            self.send_json(listing(files, path, flat="recursive=false" in self.path))
        elif is_api:
            siblings = [{"rfilename": it} for it in sorted(files)]
            about = {"id": name, "sha": oid, "siblings": siblings, "private": repository.private}
            self.send_json(about)
        elif path not in files:
            self.refuse(404, "EntryNotFound")
        else:
            self.send(files[path], oid)

    def write(self, path: str, asked: list[dict]) -> None:
        """Change a repository, or say how it is to be done."""
        first = asked[0]
        if create := path == "api/repos/create":
            name, verb, branch = f"{first.get('organization') or USER}/{first['name']}", "", ""
        else:
            owner, name, verb, *rest = [*path.removeprefix("api/models/").split("/"), ""]
            name, branch = f"{owner}/{name.removesuffix('.git')}", "/".join(rest).strip("/")
        repository = self.hub.repositories.get(name)
        if not name.startswith(USER + "/"):
            self.refuse(403, "", f"you have no rights in {name}")
        elif create and repository:
            self.refuse(409, "", "You already created this model repo")
        elif create:
            private = first.get("visibility") == "private" or first.get("private", False)
            repository = self.hub.repositories[name] = Repository(private=private)
            repository.commit("main", {".gitattributes": b"*.safetensors lfs\n"})
            self.send_json({"url": f"{self.hub.url}/{name}", "name": name})
        elif repository is None:
            self.refuse(404, "RepoNotFound")
        elif verb == "info":  # of LFS
            self.send_json({"transfer": "basic", "objects": [*map(self.wanted, first["objects"])]})
        elif verb == "branch" and branch in repository.branches:
            self.refuse(409, "", "Reference already exists")
        elif verb == "branch":
            repository.branches[branch] = repository.branches["main"]
            self.send_json({})
        elif branch not in repository.branches:
            self.refuse(404, "RevisionNotFound")
        elif verb == "preupload":
            files = repository.files(branch)
            self.send_json({"files": [mode(it["path"], files) for it in first["files"]]})
        elif verb == "commit":
            self.commit(name, repository, branch, asked)

    def wanted(self, large: dict) -> dict:
        """Where a large file is to be sent, if it is not there."""
        href = f"{self.hub.url}/lfs/{large['oid']}"
        known = large["oid"] in self.hub.large
        return {**large, **({} if known else {"actions": {"upload": {"href": href}}})}

    def store(self, oid: str, body: bytes) -> None:
        """Keep a large file."""
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(400, "", "the content is not what was announced")
            return
        self.hub.large[oid] = body
        self.send(b"")

    def commit(self, name: str, repository: Repository, branch: str, lines: list[dict]) -> None:
        """Make a commit of its lines, or a pull request of it."""
        files = dict(repository.files(branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if self.hub.spoiled in files:
            files[self.hub.spoiled] += b" "
        number = 1 + sum(it.startswith("refs/pr/") for it in repository.branches)
        proposed = "create_pr=1" in self.path
        oid = repository.commit(f"refs/pr/{number}" if proposed else branch, files)
        answer = {"success": True, "commitOid": oid}
        answer["commitUrl"] = f"{self.hub.url}/{name}/commit/{oid}"
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self.send_json(answer)

    def fail(self, status: int) -> None:
        """Answer with an error, or break the connection."""
        if status:
            self.body()
            self.refuse(status, "", "for a test")
        else:
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.hang_up()

    def hang_up(self) -> None:
        """Break the connection."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        """The body of the request, sent whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send_json(self, content: object) -> None:
        """Answer 200 with JSON."""
        self.send(json.dumps(content).encode())

    def send(self, body: bytes, commit: str = COMMIT) -> None:
        """Answer 200 with a body; HEAD gets the headers only. A byte range is honoured."""
        etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        total, headers = len(body), {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            body = body[int(start) : int(end) + 1 if end else None]
            last = int(start) + len(body) - 1
            headers["Content-Range"] = f"bytes {start}-{last}/{total}"
        self.answer(206 if wanted else 200, body, headers)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        """Answer with one of the Hub's error codes."""
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": message or code})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def listing(files: dict[str, bytes], path: str, *, flat: bool) -> list[dict[str, object]]:
    """The files below a folder, or, flat, its files and folders."""
    inside = [it for it in sorted(files) if not path or it.startswith(path + "/")]
    if not flat:
        return [entry(it, files[it]) for it in inside]
    depth = len(path.split("/")) if path else 0
    folders = {"/".join(it.split("/")[: depth + 1]) for it in inside} - set(inside)
    made = [{"type": "directory", "size": 0, "oid": COMMIT, "path": it} for it in sorted(folders)]
    return made + [entry(it, files[it]) for it in inside if it.count("/") == depth]


def entry(path: str, content: bytes) -> dict[str, object]:
    """A file in a listing."""
    about = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith(LFS):
        sha256 = hashlib.sha256(content).hexdigest()
        about["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return about


def mode(path: str, files: dict[str, bytes]) -> dict[str, object]:
    """How a file is to be sent, and what it is now."""
    known = {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
    if path.endswith(LFS):
        known["uploadMode"] = "lfs"
    if path in files:
        large = path.endswith(LFS)
        content = files[path]
        known["oid"] = hashlib.sha256(content).hexdigest() if large else git_oid(content)
    return known
