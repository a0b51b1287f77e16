"""A stand-in for the Hugging Face Hub on this machine, for its real client: repositories in memory, faults on order."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
CREATE = "/api/repos/create"
BLOBS = (".safetensors", ".png")  # what the Hub takes as LFS objects


@dataclass
class Repo:
    """Commits are whole trees: path -> content."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(tree))).encode()).hexdigest()
        self.commits[oid] = tree
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """Answers ``times`` requests of a method and path with ``status``; None cuts the connection, a PUT halfway.

    ``path`` is a regular expression; creating a repository has its name at the end.
    """

    method: str
    path: str
    status: int | None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server: ``with Hub() as hub``, then ``hub.url``; ``hub.log`` has (method, path) of all requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].find(revision)
        assert found is not None
        return self.repos[repo].commits[found]

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, if any, which counts down."""
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        # a body that is to be cut is not read to its end
        length = int(self.headers.get("Content-Length", 0))
        body = self._body() if self.command != "PUT" else b""
        with self.hub.lock:
            named = f"{path}/{json.loads(body)['name']}" if path == CREATE else path
            self.hub.log.append((self.command, named))
            fault = self.hub.fault(self.command, named)
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2 if self.command == "PUT" else 0)
            self.close_connection = True
            return
        body = self._body() if self.command == "PUT" else body
        with self.hub.lock:
            if fault is not None:
                self._answer(fault.status or 0, {"error": "on order"}, **fault.headers)
            elif path.startswith("/lfs/"):
                self._store(path.removeprefix("/lfs/"), body)
            elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
            else:
                self._route(path, body if "/commit/" in path else json.loads(body or b"null"))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str, body: Any) -> None:
        for pattern, answer in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found is not None:
                answer(self, body, **found.groupdict())
                return
        self._answer(404, {"error": f"no route for {path}"})

    def _answer(self, status: int, value: Any = None, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _store(self, oid: str, body: bytes) -> None:
        right = hashlib.sha256(body).hexdigest() == oid
        if right:
            self.hub.blobs[oid] = body
        self._answer(200 if right else 400, {})

    def _create(self, body: dict[str, Any]) -> None:
        name = f"{body['organization']}/{body['name']}"
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(private=body.get("visibility") == "private")
            self.hub.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(409 if known else 200, {"url": f"{self.hub.url}/{name}"})

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision, or an answer that there is none."""
        found = self.hub.repos.get(repo)
        oid = found.find(revision) if found else None
        if found is None or oid is None:
            code = "RevisionNotFound" if found else "RepoNotFound"
            self._answer(404, {"error": code}, X_Error_Code=code)
            return None
        return oid, found.commits[oid]

    def _validate(self, _: object) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body: dict[str, Any], repo: str, revision: str) -> None:
        if (found := self._tree(repo, revision)) is not None:
            files = [_mode(file["path"], found[1].get(file["path"])) for file in body["files"]]
            self._answer(200, {"files": files})

    def _batch(self, body: dict[str, Any], repo: str) -> None:
        if self._tree(repo, "main") is None:
            return
        objects = [
            item
            if item["oid"] in self.hub.blobs
            else {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in body["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._tree(repo, revision)) is None:
            return
        head, *lines = [json.loads(line) for line in body.splitlines()]
        if head["value"].get("parentCommit", found[0]) != found[0]:
            self._answer(412, {"error": "A commit has happened since"})
            return
        tree = dict(found[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                del tree[value["path"]]
        oid = self.hub.repos[repo].commit(revision, tree)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _info(self, _: object, repo: str, revision: str = "main") -> None:
        if (found := self._tree(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self._answer(200, {"id": repo, "sha": found[0], "siblings": siblings, "tags": [], "private": False})

    def _list(self, _: object, repo: str, revision: str, folder: str | None) -> None:
        if folder is not None:
            self._answer(404, {"error": "no folders here"}, X_Error_Code="EntryNotFound")
        elif (found := self._tree(repo, revision)) is not None:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
                for path, content in found[1].items()
            ]
            self._answer(200, files)

    def _resolve(self, _: object, repo: str, revision: str, path: str) -> None:
        if (found := self._tree(repo, revision)) is None:
            return
        oid, tree = found
        if path not in tree:
            self._answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        self._answer(200, tree[path], ETag=f'"{_oid(path, tree[path])}"', X_Repo_Commit=oid)


def _oid(path: str, content: bytes) -> str:
    """As the Hub names contents: LFS objects by their SHA-256, others as git does."""
    if path.endswith(BLOBS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _mode(path: str, present: bytes | None) -> dict[str, Any]:
    known = None if present is None else _oid(path, present)
    mode = "lfs" if path.endswith(BLOBS) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}


REPO = r"(?P<repo>[^/]+/[^/]+)"
KIND = "(?:models|datasets)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    CREATE: _Handler._create,
    r"/api/validate-yaml": _Handler._validate,
    rf"/api/models/{REPO}/preupload/{REVISION}": _Handler._preupload,
    rf"/{REPO}\.git/info/lfs/objects/batch": _Handler._batch,
    rf"/api/models/{REPO}/commit/{REVISION}": _Handler._commit,
    rf"/api/{KIND}/{REPO}": _Handler._info,
    rf"/api/{KIND}/{REPO}/revision/{REVISION}": _Handler._info,
    rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?": _Handler._list,
    rf"/(?:datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)": _Handler._resolve,
}
