"""A small Hub on this machine: just what `huggingface_hub` asks of one for a repository of files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves the files below `folder` as the one revision of `repository`, to whoever shows `token`; notes what is sent."""

    daemon_threads = True

    def __init__(self, folder: Path, repository: str, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repository, self.token = folder, repository, token
        self.sent: set[str] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path, hub = unquote(self.path.split("?")[0]), self.server
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"", {}, with_body)
        if path.startswith(f"/api/models/{hub.repository}"):
            files = sorted(file.relative_to(hub.folder).as_posix() for file in hub.folder.rglob("*") if file.is_file())
            if "/tree/" in path:
                listed = [self._entry(file) for file in files]
                return self._send(200, json.dumps(listed).encode(), {}, with_body)
            siblings = [{"rfilename": file} for file in files]
            info = {"id": hub.repository, "modelId": hub.repository, "sha": COMMIT, "siblings": siblings}
            return self._send(
                200, json.dumps(info | {"private": True, "tags": [], "downloads": 0}).encode(), {}, with_body
            )
        relative = path.removeprefix(f"/{hub.repository}/resolve/").partition("/")[2]
        file = hub.folder / relative
        if not relative or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
        if with_body:
            hub.sent.add(relative)
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self._send(200, data, headers, with_body)

    def _entry(self, file: str) -> dict[str, object]:
        data = (self.server.folder / file).read_bytes()
        return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub_of(folder: Path, repository: str, token: str) -> Iterator[Hub]:
    hub = Hub(folder, repository, token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
