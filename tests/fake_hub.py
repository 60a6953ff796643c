"""A Hub on localhost: speaks the few calls that pushing a folder makes, and keeps what it is given."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors",)  # what the Hub wants as large files


class FakeHub(ThreadingHTTPServer):
    """Attributes: `repositories` (what was asked for), `files` (repository: path: content), `variables`, `tokens`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.variables: dict[str, str] = {}
        self.tokens: set[str | None] = set()
        self.commits: list[str] = []
        self.refuse = False  # every change, as the Hub does for a wrong token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.read()
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.read()
        hub.tokens.add(self.headers.get("authorization"))
        if hub.refuse:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories[name] = asked
            hub.files.setdefault(name, {})
            place = "spaces/" if asked.get("type") == "space" else ""
            self.answer({"url": f"{hub.url}/{place}{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/variables"):
            asked = json.loads(body)
            hub.variables[asked["key"]] = asked["value"]
            self.answer({})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/(?:models|spaces)/([^/]+/[^/]+)/commit/main", self.path.partition("?")[0]):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"unknown: {self.path}"}, 404)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.files[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        self.answer(
            {"commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        )


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
