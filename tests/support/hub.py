"""A stand-in for the hub on this host: it takes repositories and commits, as huggingface_hub sends them."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What it was asked for. `refuses`: names of repositories that are another's."""

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)
    refuses: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """To one POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            if name in self.refuses:
                return 403, {"error": f"You don't have the rights to create {name}"}
            if any(made["name"] == asked["name"] for made in self.created):
                return 409, {"error": "You already created this model repo", "url": self.url(name)}
            self.created.append(asked)
            return 200, {"url": self.url(name)}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        found = re.fullmatch(r"/api/models/(.+?/.+?)/(preupload|commit)/main", path)
        if found is None:
            return 404, {"error": f"nothing at {path}"}
        name, what = found.groups()
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            }
        return 200, self._committed(name, body)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _committed(self, name: str, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.summaries.append(line["value"]["summary"])
            elif line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.files.setdefault(name, {})[line["value"]["path"]] = content
        return {"commitUrl": f"{self.url(name)}/commit/abc", "commitOid": "abc", "success": True}


@contextmanager
def hub() -> Iterator[Hub]:
    """Listens while the block runs."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.tokens.add(self.headers.get("Authorization"))
            code, said = state.answer(self.path.split("?")[0], body)
            answer = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
