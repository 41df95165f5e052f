"""Stand-ins for the Hugging Face hub and ModelScope: as much of their APIs as their clients use for an upload.
The former also serves JSON files.

What arrives is kept in memory: ``server.files("org/name")``. One token may write to the organisation ``org``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_standInStandInStandIn"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]]
    license: str | None = None
    commits: int = 0


@dataclass
class HubServer:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    uploads: list[str] = field(default_factory=list)
    """sha256 of every large file that was sent."""
    status: dict[str, int] = field(default_factory=dict)
    """Part of a path -> the status it answers with."""
    delay_s: float = 0.0

    def files(self, repo: str, branch: str | None = None) -> dict[str, bytes]:
        """Of a branch; of the only one when left out."""
        branches = self.repos[repo].branches
        return branches[branch] if branch else next(iter(branches.values()))


class Answer(Exception):
    """What ends the handling of a request."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self._body()
        time.sleep(self.hub.delay_s)
        path = unquote(urlsplit(self.path).path)
        try:
            for part, status in self.hub.status.items():
                if part in path:
                    raise Answer(status, self.refusal(status))
            self.answer(f"{self.command} {path}", body)
            raise Answer(404, self.refusal(404))
        except Answer as answer:
            data = json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def is_trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refusal(self, status: int) -> Any:
        raise NotImplementedError

    def answer(self, request: str, body: bytes) -> None:
        """Raises Answer, or returns when it knows no such path."""
        raise NotImplementedError


class HuggingFaceHandler(Handler):
    def refusal(self, status: int) -> Any:
        return {"error": f"the stand-in says {status}"}

    def answer(self, request: str, body: bytes) -> None:
        _, path = request.split(" ")
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.hub.blobs[path.removeprefix("/lfs/")] = body
            self.hub.uploads.append(path.removeprefix("/lfs/"))
            raise Answer(200, {})
        if not self.is_trusted():
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            raise Answer(401, {"error": "Invalid credentials in Authorization header"}, message)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            raise Answer(200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]})
        organisation, name, *rest = path.removeprefix("/api/models").lstrip("/").split("/")
        repo = self.hub.repos.get(f"{organisation}/{name}")
        if repo is None:
            raise Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self._in_repo(f"{organisation}/{name}", repo, rest, body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "org":
            raise Answer(403, {"error": f"You don't have the rights to create a model under {asked['organization']}"})
        if name in self.hub.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = Repo(asked.get("visibility") == "private", {"main": {}})
        raise Answer(200, {"url": f"{self.hub.url}/{name}"})

    def _validate(self, card: str) -> None:
        front = yaml.safe_load(card.split("---")[1])
        wrong = [] if isinstance(front, dict) and "library_name" in front else [{"message": "no library_name"}]
        raise Answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    def _in_repo(self, name: str, repo: Repo, rest: list[str], body: bytes) -> None:
        if not rest or rest[0] == "revision":
            raise Answer(200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": []})
        if rest[0] == "resolve":
            _, branch, file = rest
            raise Answer(200, json.loads(repo.branches[branch][file]), {"ETag": f'"{file}"', "X-Repo-Commit": "0" * 40})
        verb, branch = rest
        if verb == "branch":
            if branch in repo.branches:
                raise Answer(409, {"error": "Reference already exists"})
            repo.branches[branch] = dict(repo.branches["main"])
            raise Answer(200, {})
        if branch not in repo.branches:
            raise Answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = repo.branches[branch]
        if verb == "tree":
            raise Answer(200, [{"type": "file", "path": p, "oid": "0", "size": len(d)} for p, d in files.items()])
        if verb == "preupload":
            asked = json.loads(body)["files"]
            raise Answer(200, {"files": [self._mode(one["path"], files) for one in asked]})
        if verb != "commit":
            raise Answer(404, {"error": f"the stand-in has no {verb}"})
        for line in body.splitlines():
            self._apply(json.loads(line), files)
        repo.commits += 1
        raise Answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        is_large = path.endswith(".safetensors")
        data = files.get(path)
        oid = None
        if data is not None:
            git = hashlib.sha1(b"blob %d\0" % len(data) + data)
            oid = hashlib.sha256(data).hexdigest() if is_large else git.hexdigest()
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def _apply(self, operation: dict[str, Any], files: dict[str, bytes]) -> None:
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]


class ModelScopeHandler(Handler):
    def refusal(self, status: int) -> Any:
        return {"Code": 10010000000 + status, "Message": f"the stand-in says {status}", "Success": False}

    def answer(self, request: str, body: bytes) -> None:
        _, path = request.split(" ")
        if not self.is_trusted():
            raise Answer(401, {"Code": 10010205001, "Message": "user not logged in", "Success": False})
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.hub.blobs[path.removeprefix("/lfs/")] = body
            self.hub.uploads.append(path.removeprefix("/lfs/"))
            raise Answer(200, {"Code": 200})
        if request == "POST /api/v1/models":
            self._create(json.loads(body))
        if path.startswith("/openapi/v1/models/"):
            self._describe(path.removeprefix("/openapi/v1/models/"))
        if path.startswith("/api/v1/repos/models/"):
            organisation, name, *rest = path.removeprefix("/api/v1/repos/models/").split("/")
            self._write(f"{organisation}/{name}", rest, json.loads(body))
        if path.endswith("/repo/files"):
            name = path.removeprefix("/api/v1/models/").removesuffix("/repo/files")
            files = [{"Path": p, "Type": "blob", "Size": len(d)} for p, d in self.hub.files(name, "master").items()]
            raise Answer(200, {"Code": 200, "Data": {"Files": files}})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['Path']}/{asked['Name']}"
        if asked["Path"] != "org":
            raise Answer(403, {"Code": 10010205002, "Message": "no permission for this organization"})
        if name in self.hub.repos:
            raise Answer(400, {"Code": 10010101001, "Message": "name taken"})
        self.hub.repos[name] = Repo(asked["Visibility"] == 1, {"master": {}}, asked["License"])
        raise Answer(200, {"Code": 200, "Data": {"Path": "org", "Name": asked["Name"]}})

    def _describe(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is not None:
            raise Answer(200, {"success": True, "data": {"id": name, "private": repo.private}})

    def _write(self, name: str, rest: list[str], asked: dict[str, Any]) -> None:
        files = self.hub.files(name, "master")
        if rest == ["info", "lfs", "objects", "batch"]:
            missing = [one for one in asked["objects"] if one["oid"] not in self.hub.blobs]
            actions = [
                {"oid": one["oid"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in missing
            ]
            raise Answer(200, {"Code": 200, "Data": {"objects": actions}})
        assert rest == ["commit", "master"]
        for action in asked["actions"]:
            if action["action"] == "delete":
                del files[action["path"]]
            elif action["type"] == "lfs":
                files[action["path"]] = self.hub.blobs[action["sha256"]]
            else:
                files[action["path"]] = base64.b64decode(action["content"])
        self.hub.repos[name].commits += 1
        raise Answer(200, {"Code": 200, "Success": True, "Data": {}})


@contextmanager
def serving(kind: type[Handler]) -> Iterator[HubServer]:
    """A stand-in on a free port of this machine."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (kind,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
