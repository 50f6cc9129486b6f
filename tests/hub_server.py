"""A model hub on this machine: the few HTTP paths that downloads and uploads use, serving folders, able to fail as a hub does."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


Trouble = int | Literal["stall", "short"]
"""An HTTP status; no answer at all; a file of another length than the hub says it has."""
STALL = 2.0
"""Seconds without an answer; more than the timeout of whoever tests it."""


@dataclass
class Hub:
    """`repos` are folders by id, the same content at `main` and at COMMIT. What happened is in `requests`."""

    repos: dict[str, Path]
    token: str = ""
    gated: bool = False
    cut_after: int = 0
    """Bytes of a file after which the connection is cut, once for each file; 0: never."""
    troubles: dict[str, list[Trouble]] = field(default_factory=dict)
    """What befalls the first answers to GET of paths that end so."""
    requests: list[str] = field(default_factory=list)
    cuts: set[str] = field(default_factory=set)
    url: str = ""
    created: list[dict[str, object]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    committed: list[str] = field(default_factory=list)
    """Of uploads: repositories made, large files by their sha256, paths of a commit."""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(Requests):
            server_hub = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class Requests(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server_hub
        hub.requests.append(f"{self.command} {self.path}")
        path = unquote(self.path.split("?")[0])
        coming = next((left for end, left in hub.troubles.items() if path.endswith(end) and left), None)
        if coming and self.command == "GET":
            trouble = coming.pop(0)
            if isinstance(trouble, int):
                return self.answer(trouble, b"{}")
            if trouble == "stall":
                return time.sleep(STALL)
            return self.answer(200, b"a file of another length")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Unauthorized")
        named = re.match(r"/(?:api/models/)?([^/]+/[^/]+)/?(.*)", path)
        folder = hub.repos.get(named[1]) if named else None
        if named is None or folder is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if hub.gated and "/resolve/" in path:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        revision = re.search(r"(?:revision|tree|resolve)/([^/]+)", named[2])
        if revision and revision[1] not in ("main", COMMIT):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if not path.startswith("/api/"):
            return self.file(folder / re.sub(r"^resolve/[^/]+/", "", named[2]))
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if named[2].startswith("tree/"):
            rows = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": etag(folder / name)} for name in names
            ]
            return self.reply(rows)
        siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
        info = {"id": named[1], "modelId": named[1], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return self.reply(info)

    def body(self) -> bytes:
        """What was sent, with a length or in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self) -> None:
        self.server_hub.objects[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        """What an upload of a folder asks for: make a repository, which files are large, where to, commit."""
        hub, content = self.server_hub, self.body()
        hub.requests.append(f"POST {self.path}")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b'{"error": "Unauthorized"}')
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(content))
            return self.reply({"url": f"{hub.url}/someone/new", "id": "someone/new"})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(content)["files"]
            mode = {True: "lfs", False: "regular"}
            rows = [
                {"path": row["path"], "uploadMode": mode[row["path"].endswith(".safetensors")], "shouldIgnore": False}
                for row in asked
            ]
            return self.reply({"files": rows})
        if self.path.endswith("/objects/batch"):
            objects = json.loads(content)["objects"]
            for row in objects:
                row["actions"] = {"upload": {"href": f"{hub.url}/lfs/{row['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        lines = [json.loads(line) for line in content.splitlines()]
        hub.committed += [line["value"]["path"] for line in lines if line["key"] in ("file", "lfsFile")]
        return self.reply({"commitUrl": f"{hub.url}/someone/new/commit/{COMMIT}", "commitOid": COMMIT})

    def reply(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def file(self, file: Path) -> None:
        hub = self.server_hub
        if not file.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = file.read_bytes()
        first = int((re.search(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        rest = content[first:]
        if self.command == "GET" and hub.cut_after and len(rest) > hub.cut_after and file.name not in hub.cuts:
            hub.cuts.add(file.name)
            self.send_response(206 if first else 200)
            for name, value in {**headers, "Content-Length": str(len(rest))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(rest[: hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        return self.answer(206 if first else 200, rest, **headers)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
