"""Fuzz targets of what comes over a wire: requests to the server, a hub's answers, HTTP itself."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from engine import hub, inventory
from engine.fetch import Client, Refused, Response, Transient
from engine.pull import RECORD, _Part, _read_record
from engine.server.app import build_app
from tests.engine.server_fixtures import HashSession, make_engine, make_service
from tests.fuzz.target import Finding, Target, pack_files, unpack_files
from tests.fuzz.text_targets import each

COMMIT, SHA = "a" * 40, "b" * 64


@cache
def _server() -> tuple[Any, asyncio.AbstractEventLoop]:
    logging.getLogger("halo.server").setLevel(logging.CRITICAL)
    service = make_service(make_engine(HashSession(), context=400))
    service.runner.start()
    return build_app(service), asyncio.new_event_loop()


async def _ask(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    waiting = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not parts:
            await waiting.wait()
        return parts.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"authorization", b"Bearer x")],
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9),
    }  # fmt: skip
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], body


def request(path: str) -> Callable[[bytes, Path], None]:
    def run(data: bytes, _folder: Path) -> None:
        app, loop = _server()
        status, body = loop.run_until_complete(_ask(app, path, data))
        if status >= 500 or (status != 200 and "error" not in json.loads(body)):
            raise Finding(f"the server answered {status}: {body[:200].decode('utf-8', 'replace')}")

    return run


class _Answer(Response):
    """An answer that needs no socket."""

    def __init__(self, data: bytes, link: str) -> None:
        self.status, self.url, self._data, self._link = 200, "https://hub.example/x", data, link

    def header(self, name: str) -> str:
        return self._link if name == "Link" else ""

    def chunks(self) -> Iterator[bytes]:
        yield self._data


class _Hub(Client):
    """A hub whose answers are an input's files."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__("https://hub.example")
        self.files = files

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Response]:
        name = "revision" if "/revision/" in url else "tree" if "recursive" in url else "next"
        link = self.files.get("link", b"").decode("latin-1") if name != "next" else ""
        yield _Answer(self.files.get(name, b"null"), link)


HUB = ("revision", "tree", "next", "link", "index", "record", "part", "repo")


def run_hub(data: bytes, folder: Path) -> None:
    """A hub's answers, and the records that a pull keeps of them."""
    files = unpack_files(data, HUB)
    client = _Hub(files)
    found: list[hub.RemoteFile] = []
    (folder / hub.INDEX).write_bytes(files.get("index", b""))
    (folder / RECORD).write_bytes(files.get("record", b""))
    (folder / "w.part.json").write_bytes(files.get("part", b""))
    (folder / "w.part").write_bytes(b"half")
    each(
        lambda: hub.split_repo(files.get("repo", b"").decode("latin-1")),
        lambda: hub.resolve(client, "a/b", "main"),
        lambda: found.extend(hub.listing(client, "a/b", COMMIT)),
        lambda: hub.choose(found, "a/b", None),
        lambda: hub.choose(found, "a/b", "m.gguf"),
        lambda: hub.shards(folder / hub.INDEX, found),
        lambda: _read_record(folder / RECORD),
        lambda: inventory._source(folder).encode(),
        lambda: _Part(folder / "w", hub.RemoteFile("w", 9, COMMIT, SHA)).stream.close(),
    )
    for file in found:
        assert file.name not in ("", ".", "..") and "/" not in file.name
        hub.file_url("https://hub.example", "a/b", COMMIT, file.path)


class _Pair(http.client.HTTPConnection):
    """A connection whose other end has said what the input is, and closed."""

    def __init__(self, data: bytes) -> None:
        super().__init__("127.0.0.1", 9, timeout=5)
        self.data = data

    def connect(self) -> None:
        self.sock, other = socket.socketpair()
        with other:
            other.sendall(self.data[:65536])
            other.shutdown(socket.SHUT_WR)
            self.other = other.dup()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(AttributeError):
            self.other.close()


class _Wired(Client):
    def __init__(self, data: bytes) -> None:
        super().__init__("http://127.0.0.1:9", stall=5.0)
        self.data = data

    def _connection(self, url: str) -> http.client.HTTPConnection:
        return _Pair(self.data)


def run_http(data: bytes, _folder: Path) -> None:
    """An answer's bytes as they come over a socket."""
    client = _Wired(data)

    def chunks() -> None:
        with client.get("http://127.0.0.1:9/a?b") as response:
            assert sum(map(len, response.chunks())) <= len(data)

    for call in (lambda: client.json("http://127.0.0.1:9/a"), chunks):
        with contextlib.suppress(Transient, Refused):
            call()


def _chat() -> Iterator[bytes]:
    message = {"role": "user", "content": "Hello"}
    plain = {"messages": [message], "max_tokens": 3}
    yield json.dumps(plain).encode()
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    more = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}],
        "n": 2,
        "seed": 7,
    }
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    yield json.dumps(more | options | {"max_completion_tokens": 4, "stop": ["x", "y"]}).encode()
    more = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "response_format": {"type": "text"},
        "model": "halo-test",
    }
    yield json.dumps(plain | more | {"tools": [], "logprobs": False, "stop": "."}).encode()
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    told = [message, {"role": "assistant", "tool_calls": [call]}]
    told.append({"role": "tool", "tool_call_id": "c", "content": "x"})
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    yield json.dumps({"messages": told, "max_tokens": 4, "parallel_tool_calls": False} | tools).encode()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", 1]}}}
    scores = {"logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -9}, "min_p": 0.1, "ignore_eos": True}
    yield json.dumps(plain | scores | {"response_format": form, "frequency_penalty": 1, "n": 2}).encode()


def _completion() -> Iterator[bytes]:
    yield b'{"prompt": "a b", "max_tokens": 2, "temperature": 0}'
    yield b'{"prompt": ["a", [2, 3]], "n": 2, "max_tokens": 2, "stream": true, "echo": false}'
    yield b'{"prompt": ["x", [4]], "echo": true, "logprobs": 2, "max_tokens": 1, "best_of": 2, "n": 1}'
    yield b'{"prompt": [4, 5], "stop": "q", "seed": -1, "top_k": -1, "suffix": "", "max_tokens": 1}'


def _hub() -> Iterator[bytes]:
    file = {"type": "file", "path": "config.json", "size": 2, "oid": COMMIT}
    weights = file | {"path": "model.safetensors.index.json"}
    shard = file | {"path": "a.safetensors", "lfs": {"oid": SHA, "size": 9}}
    single = file | {"path": "m.gguf", "size": 3}
    record = {
        "endpoint": "https://hub.example",
        "repo": "a/b",
        "revision": "main",
        "file": None,
        "commit": COMMIT,
    }
    files: dict[str, object] = {
        "revision": {"sha": COMMIT}, "tree": [file, weights, {"type": "directory", "path": "d"}],
        "next": [shard, single], "index": {"weight_map": {"x": "a.safetensors"}},
        "record": record | {"files": {}},
        "part": {"pin": f"sha256:{SHA}", "bytes": 9, "etag": '"e"'},
    }  # fmt: skip
    packed = {name: json.dumps(value).encode() for name, value in files.items()}
    yield pack_files(packed | {"link": b'<https://hub.example/n>; rel="next"', "repo": b"a/b@main"})


def _http() -> Iterator[bytes]:
    yield b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\nETag: "e"\r\n\r\n{"a": 1}'
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n"
    yield b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n"
    yield b"HTTP/1.1 429 Slow\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n\r\n"
    yield b"HTTP/1.1 401 No\r\nX-Error-Code: GatedRepo\r\n\r\n"
    yield b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-1/2\r\nContent-Encoding: gzip\r\n\r\nab"


_BODY = (
    b'"messages"', b'"role"', b'"content"', b'"assistant"', b'"developer"', b'"n"', b'"stream"', b"true",
    b"null", b'"max_tokens"', b'"temperature"', b'"seed"', b'"stop"', b'"prompt"', b"1e400",
    b"-9223372036854775809", b"18446744073709551616", b"\\ud83d", b"\\u0000", b'"logprobs"',
    b'"response_format"', b"[[", b'"tools"', b'"tool_choice"', b'"tool_calls"', b'"json_schema"', b'"schema"',
    b'"echo"', b'"best_of"', b'"logit_bias"', b'"top_logprobs"', b'"repetition_penalty"', b'"min_p"',
)  # fmt: skip
_HTTP = (
    b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Location: ", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Retry-After: ", b"\r\n\r\n", b"//", b"http://127.0.0.1:9/", b"https://[::1", b"%00",
    b"\r\n ", b"ffffff",
)  # fmt: skip

TARGETS = [
    Target("chat_request", request("/v1/chat/completions"), _chat, words=_BODY, seconds=5.0),
    Target("completion_request", request("/v1/completions"), _completion, words=_BODY, seconds=5.0),
    Target(
        "hub", run_hub, _hub, words=(b'"lfs"', b'"oid"', b'"size"', b'"path"', b"../", b"\\u0000", b"sha256:")
    ),
    Target("http", run_http, _http, words=_HTTP),
]
