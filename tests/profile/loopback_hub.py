"""A hub on loopback that speaks what huggingface_hub asks to push and pull small repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_loopback"


class LoopbackHub:
    """Repositories as lists of commits, each a whole tree; the last one is `main`.

    `asked` are the requests so far. Names in `private` are known to the token alone, like any
    change. `cards` are those that the hub was asked to check. Names in `gated` are refused to all;
    of the file `broken` the first half is sent and no rest.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.cards: list[str] = []
        self.names_commits = True
        self.gated: set[str] = set()
        self.broken = ""

    def create(self, name: str, private: bool = False) -> bool:
        """Make a repository; False where there is one."""
        if name in self.repositories:
            return False
        self.repositories[name] = [(self._digest(name, {}), {})]
        if private:
            self.private.add(name)
        return True

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Add files on top of the last commit, and return the new one."""
        tree = {**self.repositories[name][-1][1], **files}
        made = self._digest(name, tree)
        self.repositories[name].append((made, tree))
        return made

    def tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and files at a revision; None where there is none."""
        commits = self.repositories[name]
        if revision == "main":
            return commits[-1]
        return next((one for one in commits if one[0] == revision), None)

    def _digest(self, name: str, tree: dict[str, bytes]) -> str:
        seed = repr((name, len(self.repositories.get(name, ())), sorted(tree)))
        return hashlib.sha1(seed.encode()).hexdigest()


def _is_private(wanted: dict[str, Any]) -> bool:
    """As older clients say it, and newer ones."""
    return wanted.get("private") is True or wanted.get("visibility") == "private"


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._note()
        if not self._knows_token():
            return self._answer(401, {"error": "no token"})
        if path == ["api", "repos", "create"]:
            wanted = json.loads(data)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            made = self.hub.create(name, _is_private(wanted))
            return self._answer(200 if made else 409, {"url": self._url(name), "name": name})
        if path == ["api", "validate-yaml"]:
            self.hub.cards.append(json.loads(data)["content"])
            return self._answer(200, {"errors": [], "warnings": []})
        owner, name, verb = path[2], path[3], path[4]
        if verb == "preupload":
            files = json.loads(data)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return self._answer(200, {"files": [{"path": f["path"], **told} for f in files]})
        assert verb == "commit", path
        lines = [json.loads(line) for line in data.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        made = self.hub.commit(f"{owner}/{name}", files)
        url = f"{self._url(f'{owner}/{name}')}/commit/{made}"
        return self._answer(200, {"success": True, "commitOid": made, "commitUrl": url})

    def _get(self, body: bool) -> None:
        path = self._note()
        if path[0] == "api":
            return self._listing(path, body)
        if path[0] == "datasets":
            path = path[1:]
        repository, verb, revision, file = f"{path[0]}/{path[1]}", path[2], path[3], path[4]
        assert verb == "resolve", path
        hidden = repository in self.hub.private and not self._knows_token()
        if repository not in self.hub.repositories or hidden:
            return self._answer(404, {}, body, {"X-Error-Code": "RepoNotFound"})
        found = self.hub.tree(repository, revision)
        if found is None:
            return self._answer(404, {}, body, {"X-Error-Code": "RevisionNotFound"})
        if repository in self.hub.gated:
            return self._answer(403, {}, body, {"X-Error-Code": "GatedRepo"})
        commit, tree = found
        file = "/".join(path[4:])
        headers = {"X-Repo-Commit": commit} if self.hub.names_commits else {}
        if file not in tree:
            return self._answer(404, {}, body, {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha1(tree[file]).hexdigest()}"'
        return self._file(file, tree[file], body, headers)

    def _file(self, name: str, data: bytes, body: bool, headers: dict[str, str]) -> None:
        """A file, or its rest from the byte that is asked for."""
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, status = int(asked[0]), 200
        headers["Accept-Ranges"] = "bytes"
        if start and body:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        if not (body and name == self.hub.broken):
            return self._answer(status, data[start:], body, headers)
        self._answer(status, data[start:], False, headers)
        self.wfile.write(b"" if start else data[: len(data) // 2])
        self.close_connection = True
        return None

    def _listing(self, path: list[str], body: bool) -> None:
        """`api/models/owner/name/revision/main` and `.../tree/main`: a repository's files."""
        name, verb, revision = "/".join(path[2:4]), *(path[4:6] or ("revision", "main"))
        if name not in self.hub.repositories or name in self.hub.private or path[6:]:
            return self._answer(404, {"error": "nothing here"}, body)
        found = self.hub.tree(name, revision)
        assert found is not None, path
        commit, tree = found
        files = [
            {"type": "file", "path": file, "rfilename": file, "size": len(data),
             "oid": hashlib.sha1(data).hexdigest()}
            for file, data in tree.items()
        ]  # fmt: skip
        info = {"id": name, "sha": commit, "siblings": files, "private": False}
        return self._answer(200, files if verb == "tree" else info, body)

    def _note(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _url(self, name: str) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}/{name}"

    def _answer(
        self, status: int, content: Any, body: bool = True, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """See the base class; says nothing."""


@contextmanager
def serving() -> Iterator[tuple[LoopbackHub, str]]:
    """A hub, and the address that it answers at."""
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def asked_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LoopbackHub]:
    """The hub that huggingface_hub asks while within, with a cache of its own and no token."""
    with serving() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield hub
