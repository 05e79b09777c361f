"""A Hugging Face Hub of one process, for tests: what the client library asks, and no more.

Serves models from memory over HTTP, on this machine only. Give a client the environment that
`HubServer.environment` returns; the library reads it when it is imported.

Every route is one function in `ROUTES`. To teach the server another request, write a function that
takes the server, the request and the match of its path, and add a line to the table.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "HubServer", "Reply", "Repository", "Request"]

LARGE = (".safetensors", ".bin", ".gguf", ".pt")
"""Endings of files that the Hub keeps in its large-file storage (LFS)."""


@dataclass(frozen=True)
class Request:
    """What a client asks: the path is decoded only after it is matched, since a revision may
    hold an encoded slash."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Reply:
    """What the server answers.

    Attributes:
        status: HTTP status code.
        body: The content; of a HEAD request only its length is sent.
        headers: Besides Content-Length.
        cut: Close the connection after so many bytes of the body; None to send all of it.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Fault:
    """What goes wrong, and how often.

    Attributes:
        pattern: Regular expression that the method and the path are searched for,
            as in ``GET /org/a/resolve``.
        times: Number of requests that it spoils; -1 for all.
        status: Answer with this status; None to answer what is right.
        cut: Close the connection after so many bytes of the body.
    """

    pattern: str
    times: int = -1
    status: int | None = None
    cut: int | None = None


@dataclass
class Repository:
    """A model: its commits, each a whole set of files, and the names that point at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    tags: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag, or a hash or its beginning means."""
        if revision in self.refs:
            return self.refs[revision]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


class HubServer:
    """Models by name, the requests that came, and the faults still to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        # A short poll, so that closing does not wait for the default half second.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that send the client library here, and nowhere else.

        Args:
            home: Folder for its cache and token.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(
        self, repo: str, files: Mapping[str, bytes], ref: str = "main", gated: bool = False
    ) -> str:
        """Commit a whole set of files, and point a branch or tag at it; returns the commit."""
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository())
            repository.gated = gated
            listing = [repo, ref, str(len(repository.commits))]
            listing += [
                f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in files.items()
            ]
            sha = hashlib.sha1("\n".join(listing).encode()).hexdigest()
            repository.commits[sha] = dict(files)
            repository.refs[ref] = sha
            return sha

    def add_folder(self, repo: str, folder: Path, ref: str = "main", gated: bool = False) -> str:
        """Commit the files of a folder."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.add(repo, files, ref, gated)

    def fetched(self, repo: str) -> list[str]:
        """The files of a model whose contents were asked for, each once, sorted."""
        pattern = re.compile(rf"/{re.escape(repo)}/resolve/[^/]+/(.+)")
        found = [pattern.fullmatch(path) for method, path in self.requests if method == "GET"]
        return sorted({unquote(match[1]) for match in found if match})

    def answer(self, request: Request) -> Reply:
        """Answer a request, spoiled by the first fault that fits."""
        with self.lock:
            self.requests.append((request.method, request.path))
            fault = self._fault(f"{request.method} {request.path}")
            if fault is not None and fault.status is not None:
                return Reply(fault.status, b"spoiled on purpose")
            reply = self._route(request)
            if fault is not None:
                reply.cut = fault.cut
            return reply

    def _fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times != 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None

    def _route(self, request: Request) -> Reply:
        for methods, pattern, route in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                return route(self, request, {k: unquote(v or "") for k, v in _named(match)})
        return Reply(404, b"no such route")

    def close(self) -> None:
        """Stop; later requests find nobody."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self.close()


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.reply = _json({"error": code}, status)
        self.reply.headers["X-Error-Code"] = code
        self.reply.headers["X-Error-Message"] = code


def _named(match: re.Match[str]) -> Iterator[tuple[str, str | None]]:
    yield from match.groupdict().items()


def _json(document: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(document).encode(), {"Content-Type": "application/json"})


def _commit(server: HubServer, words: Mapping[str, str], revision: str) -> tuple[Repository, str]:
    repository = server.repositories.get(words["repo"])
    if repository is None:
        raise _Refusal(404, "RepoNotFound")
    sha = repository.find(revision)
    if sha is None:
        raise _Refusal(404, "RevisionNotFound")
    return repository, sha


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def model_info(server: HubServer, _request: Request, words: Mapping[str, str]) -> Reply:
    """Name, commit and file names of a model; a gated model tells them to anybody."""
    repository, sha = _commit(server, words, words.get("revision") or "main")
    return _json(
        {
            "_id": sha[:24],
            "id": words["repo"],
            "modelId": words["repo"],
            "sha": sha,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [
                _sibling(name, data) for name, data in sorted(repository.commits[sha].items())
            ],
        }
    )


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob_id(data)}
    if name.endswith(LARGE):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
    return found


def tree(server: HubServer, _request: Request, words: Mapping[str, str]) -> Reply:
    """Every file of a commit, with sizes and hashes."""
    repository, sha = _commit(server, words, words["revision"])
    entries: list[dict[str, Any]] = []
    for name, data in sorted(repository.commits[sha].items()):
        entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
        if name.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        entries.append(entry)
    return _json(entries)


def resolve(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """A file's contents, or a range of them."""
    repository, sha = _commit(server, words, words["revision"])
    if repository.gated and "authorization" not in request.headers:
        raise _Refusal(403, "GatedRepo")
    data = repository.commits[sha].get(words["path"])
    if data is None:
        refusal = _Refusal(404, "EntryNotFound")
        refusal.reply.headers["X-Repo-Commit"] = sha
        raise refusal
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{_blob_id(data)}"'}
    if words["path"].endswith(LARGE):
        headers["X-Linked-Size"] = str(len(data))
        headers["X-Linked-Etag"] = headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not wanted:
        return Reply(200, data, headers)
    start, stop = int(wanted[1]), min(len(data), int(wanted[2] or len(data)) + 1)
    if start >= len(data):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Reply(206, data[start:stop], headers)


def create(server: HubServer, request: Request, _words: Mapping[str, str]) -> Reply:
    """Make a repository; it begins with the file that the Hub puts there."""
    asked = json.loads(request.body)
    repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
    reply = {"url": f"{server.url}/{repo}", "id": repo, "name": repo}
    if repo in server.repositories:
        return _json({**reply, "error": "You already created this model repo"}, 409)
    server.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    server.repositories[repo].private = private
    return _json(reply)


def new_collection(server: HubServer, request: Request, _words: Mapping[str, str]) -> Reply:
    """Make a collection of models."""
    asked = json.loads(request.body)
    slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-{'0' * 24}"
    if slug in server.collections:
        return _json({"slug": slug, "error": "exists"}, 409)
    server.collections[slug] = []
    return _collection(server, slug)


def collection(server: HubServer, _request: Request, words: Mapping[str, str]) -> Reply:
    """A collection."""
    return _collection(server, words["slug"])


def into_collection(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Put a model into a collection."""
    item = json.loads(request.body)["item"]["id"]
    if item in server.collections[words["slug"]]:
        return _json({"error": "exists"}, 409)
    server.collections[words["slug"]].append(item)
    return _collection(server, words["slug"])


def _collection(server: HubServer, slug: str) -> Reply:
    if slug not in server.collections:
        raise _Refusal(404, "RepoNotFound")
    items = [
        {"_id": str(at), "id": name, "type": "model", "position": at}
        for at, name in enumerate(server.collections[slug])
    ]
    return _json({
        "slug": slug, "title": slug, "owner": {"name": slug.partition("/")[0]}, "items": items,
        "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 1, "private": False, "theme": "blue",
        "upvotes": 0,
    })  # fmt: skip


def refs(server: HubServer, _request: Request, words: Mapping[str, str]) -> Reply:
    """Branches and tags."""
    repository, _ = _commit(server, words, "main")
    listed = {
        kind: [
            {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha}
            for name, sha in sorted(repository.refs.items())
            if (name in repository.tags) == (kind == "tags")
        ]
        for kind, where in (("branches", "heads"), ("tags", "tags"))
    }
    return _json({**listed, "converts": []})


def preupload(_server: HubServer, request: Request, _words: Mapping[str, str]) -> Reply:
    """Tell which files go to the large-file storage."""
    files = json.loads(request.body)["files"]
    return _json(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
        }
    )


def lfs_batch(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Say where large files are to be sent; those that are there need not be."""
    repository = server.repositories[words["repo"]]
    objects = []
    for entry in json.loads(request.body)["objects"]:
        found: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in repository.large:
            found["actions"] = {
                "upload": {"href": f"{server.url}/lfs/{words['repo']}/{entry['oid']}"},
                "verify": {"href": f"{server.url}/lfs-verify/{words['repo']}"},
            }
        objects.append(found)
    reply = _json({"transfer": "basic", "objects": objects})
    reply.headers["Content-Type"] = "application/vnd.git-lfs+json"
    return reply


def lfs_put(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Take a large file, if it is what it is said to be."""
    if hashlib.sha256(request.body).hexdigest() != words["oid"]:
        return Reply(422, b"another digest")
    server.repositories[words["repo"]].large[words["oid"]] = request.body
    return Reply(200)


def lfs_verify(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Say whether a large file has come."""
    asked = json.loads(request.body)
    there = asked["oid"] in server.repositories[words["repo"]].large
    return Reply(200 if there else 404)


def commit(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Make a commit of additions and deletions, on the parent that the client names."""
    repository, head = _commit(server, words, words["revision"])
    files = dict(repository.commits[head])
    for line in request.body.splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header" and value.get("parentCommit") not in (None, head):
            return _json({"error": "the branch has moved"}, 412)
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            if value["oid"] not in repository.large:
                return _json({"error": "a large file has not come"}, 422)
            files[value["path"]] = repository.large[value["oid"]]
        elif entry["key"] == "deletedFile":
            files.pop(value["path"])
    sha = server.add(words["repo"], files, words["revision"])
    url = f"{server.url}/{words['repo']}/commit/{sha}"
    return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def tag(server: HubServer, request: Request, words: Mapping[str, str]) -> Reply:
    """Name a commit."""
    repository, sha = _commit(server, words, words["revision"])
    name = json.loads(request.body)["tag"]
    if name in repository.refs:
        return _json({"error": "the tag is there already"}, 409)
    repository.refs[name] = sha
    repository.tags.add(name)
    return Reply(200)


def validate(_server: HubServer, _request: Request, _words: Mapping[str, str]) -> Reply:
    """Find nothing wrong with a card."""
    return _json({"errors": [], "warnings": []})


Route = Callable[[HubServer, Request, Mapping[str, str]], Reply]

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: tuple[tuple[tuple[str, ...], str, Route], ...] = (
    (("GET",), rf"/api/models/{_REPO}(/revision/{_REVISION})?", model_info),
    (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}", tree),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate),
    (("POST",), "/api/collections", new_collection),
    (("GET",), r"/api/collections/(?P<slug>[\w/-]+)", collection),
    (("POST",), r"/api/collections/(?P<slug>[\w/-]+)/items", into_collection),
    (("GET",), rf"/api/models/{_REPO}/refs", refs),
    (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)", lfs_put),
    (("POST",), rf"/lfs-verify/{_REPO}", lfs_verify),
    (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", commit),
    (("POST",), rf"/api/models/{_REPO}/tag/{_REVISION}", tag),
    (("GET", "HEAD"), rf"/(datasets/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)", resolve),
)
"""Methods, path, and what answers; the first that fits counts."""


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, urlsplit(self.path).path, headers, body)
            try:
                reply = server.answer(request)
            except _Refusal as refusal:
                reply = refusal.reply
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(reply.body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if reply.cut is not None:
                self.close_connection = True
            if self.command != "HEAD":
                self.wfile.write(reply.body[: reply.cut])

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_words: object) -> None:
            """Say nothing; what came is in `HubServer.requests`."""

    return Handler
