"""A hub on loopback that misbehaves on request: it cuts, stalls, lies, redirects and refuses."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

COMMIT = "1" * 40
REPO = "someone/tiny"


def blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes, lfs: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_sha1(data)}
    if lfs:
        pointer = blob_sha1(b"pointer")
        sha256 = hashlib.sha256(data).hexdigest()
        made |= {"oid": pointer, "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
    return made


class Hub:
    """Files of one repository at commits; `faults[file]` are answers to give before the right one."""

    def __init__(self, files: dict[str, bytes], context: ssl.SSLContext | None = None) -> None:
        self.commits: dict[str, dict[str, bytes]] = {COMMIT: dict(files)}
        self.branches = {"main": COMMIT}
        self.faults: dict[str, list[Callable[[Answer, bytes], None]]] = defaultdict(list)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.page = 1000
        self.listing: Any = None
        self.ranges = True
        self.etag = True
        hub = self

        class Handler(Answer):
            pass

        Handler.hub = hub
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.scheme = "http"
        if context is not None:
            self.scheme = "https"
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}"

    def requests(self, file: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.seen if path.rpartition("/")[2] == file]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        self.hub.seen.append((path, dict(self.headers)))
        file = path.rpartition("/")[2]
        body = self._body(path, url.query)
        faults = self.hub.faults[file]
        if faults:
            faults.pop(0)(self, body or b"")
        elif body is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif "/resolve/" in path:
            self.serve(body)
        else:
            self.reply(200, body, self._link(path, url.query))
        self.close_connection = True

    def _body(self, path: str, query: str) -> bytes | None:
        match = re.fullmatch(rf"/api/models/{REPO}/(revision|tree)/(.+)", path)
        if match and match[1] == "revision":
            commit = self.hub.branches.get(match[2], match[2])
            return json.dumps({"id": REPO, "sha": commit}).encode() if commit in self.hub.commits else None
        if match:
            if self.hub.listing is not None:
                return json.dumps(self.hub.listing).encode()
            files = self.hub.commits[match[2]]
            entries = [
                entry(name, data, name.endswith((".safetensors", ".gguf"))) for name, data in files.items()
            ]
            at = int(dict(urllib.parse.parse_qsl(query)).get("cursor", 0))
            return json.dumps(entries[at : at + self.hub.page]).encode()
        match = re.fullmatch(rf"/{REPO}/resolve/({COMMIT}|[0-9a-f]{{40}})/(.+)", path)
        return self.hub.commits.get(match[1], {}).get(match[2]) if match else None

    def _link(self, path: str, query: str) -> dict[str, str]:
        at = int(dict(urllib.parse.parse_qsl(query)).get("cursor", 0)) + self.hub.page
        if "/tree/" not in path or self.hub.listing is not None or at >= len(self.hub.commits[path[-40:]]):
            return {}
        return {"Link": f'<{self.hub.url}{path}?recursive=true&cursor={at}>; rel="next"'}

    def serve(self, body: bytes, cut: int | None = None) -> None:
        """The right answer; with `cut`, only that many bytes of it and then a closed connection."""
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        headers = {"ETag": etag} if self.hub.etag else {}
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if match and self.hub.ranges and same:
            start = int(match[1])
            if start >= len(body):
                return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self.reply(206, body[start:], headers, cut=cut)
        return self.reply(200, body, headers, cut=cut)

    def reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        headers = headers or {}
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        self.wfile.flush()
        if cut is not None:
            self.hang_up()

    def hang_up(self) -> None:
        with_suppress(lambda: self.connection.shutdown(socket.SHUT_RDWR))


def with_suppress(action: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        action()


def cut(after: int) -> Callable[[Answer, bytes], None]:
    return lambda answer, body: answer.serve(body, cut=after)


def status(code: int, **headers: str) -> Callable[[Answer, bytes], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer, body: answer.reply(code, b"no", named)


def lie(body: bytes, **headers: str) -> Callable[[Answer, bytes], None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer, _: answer.reply(200, body, named)


def stall(answer: Answer, body: bytes) -> None:
    answer.send_response(200)
    answer.send_header("Content-Length", str(len(body)))
    answer.end_headers()
    answer.wfile.write(body[: len(body) // 2])
    answer.wfile.flush()
    time.sleep(1.5)


def dribble(answer: Answer, body: bytes) -> None:
    answer.send_response(200)
    answer.send_header("Content-Length", str(len(body)))
    answer.end_headers()
    with_suppress(lambda: _drip(answer, body))


def dribble_headers(answer: Answer, body: bytes) -> None:
    answer.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    with_suppress(lambda: _drip(answer, b"y" * 1000))


def _drip(answer: Answer, data: bytes) -> None:
    for at in range(min(len(data), 60)):
        answer.wfile.write(data[at : at + 1])
        answer.wfile.flush()
        time.sleep(0.05)
