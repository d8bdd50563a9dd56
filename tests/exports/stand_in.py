"""A stand-in for the HTTP interface of the hub, as far as a repository and a commit need it."""

import base64
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.serving import on_localhost

TOKEN = "token-of-the-test"
OWNER = "me"
_LARGE = (".safetensors", ".parquet", ".gguf")


@dataclass
class Repository:
    """`files` are those of the last commit of each, by their name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """What it holds, by kind and name, and the paths that were asked for. `status` fails every commit."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    status: int = 200


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        known = self.headers.get("authorization") == f"Bearer {TOKEN}" or self.path.startswith("/large/")
        status, value = self.answer(content) if known else (401, {"error": "Invalid credentials"})
        packed = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(packed)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(packed)

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def answer(self, content: bytes) -> tuple[int, Any]:
        hub, path = self.hub, self.path
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if path == "/api/validate-yaml":
            assert json.loads(content)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = content
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(content)["objects"]
            links = [{"upload": {"href": f"{hub.url}/large/{o['oid']}"}} for o in wanted]
            return 200, {"objects": [{**o, "actions": a} for o, a in zip(wanted, links, strict=True)]}
        return self.of_repository(path, content)

    def of_repository(self, path: str, content: bytes) -> tuple[int, Any]:
        hub = self.hub
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        repository = hub.repositories.get(f"{kind}/{owner}/{name}")
        if repository is None:
            return 404, {"error": "Repository not found"}
        if not rest:
            return 200, {"id": f"{owner}/{name}", "private": repository.private, "sha": "0" * 40}
        if rest[0] == "preupload":
            return 200, {"files": [self.mode(file) for file in json.loads(content)["files"]]}
        assert rest == ["commit", "main"]
        if hub.status != 200:
            return hub.status, {"error": "out of order"}
        self.commit(repository, content)
        address = f"{hub.url}/{'datasets/' * (kind == 'datasets')}{owner}/{name}/commit/1"
        return 200, {"commitUrl": address, "commitOid": "1" * 40}

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        key = f"{wanted.get('type', 'model')}s/{name}"
        if wanted["organization"] != OWNER:
            return 403, {"error": "You don't have the rights"}
        if key in self.hub.repositories:
            return 409, {"error": "You already created this repo"}
        self.hub.repositories[key] = Repository(private=wanted["visibility"] == "private")
        return 200, {"url": f"{self.hub.url}/{name}"}

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def commit(self, repository: Repository, content: bytes) -> None:
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
        repository.commits += 1

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Generator[Hub]:
    """A hub on localhost."""
    running = Hub()
    with on_localhost(type("Handler", (_Handler,), {"hub": running})) as running.url:
        yield running
