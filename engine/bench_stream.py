"""The client of `halo bench --serve`: servers as child processes, requests to them over real sockets.

Plain sockets and few lines: the client shares the processor with what it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError

START_SECONDS: Final = 180.0
ANSWER_SECONDS: Final = 600.0
_POLL: Final = 0.001
_ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Streamed:
    """One streamed completion: seconds to its first token and to its end, and its tokens by `usage`."""

    first: float
    whole: float
    tokens: int


def halo_command() -> list[str]:
    """The halo that runs this: a generation's launcher, or this source tree."""
    if generation := os.environ.get("HALO_GENERATION_DIR"):
        return [str(Path(generation) / "bin/halo")]
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
    code += "from provision.cli import main; raise SystemExit(main())"
    return [sys.executable, "-I", "-c", code]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Server:
    """A server that runs as a child process on a loopback port; `started` is when it was executed."""

    def __init__(self, name: str, argv: Sequence[str], port: int, log: Path) -> None:
        self.name, self.port, self._log = name, port, log
        with log.open("wb") as stream:
            self.started = time.perf_counter()
            self.process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )

    def wait_health(self, *, loaded: bool = False) -> float:
        """Seconds from exec to the first 200 of /health, or to the first that says it has loaded."""
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                status, body = get(self.port, "/health")
                if status == 200 and not (loaded and json.loads(body).get("loading")):
                    return time.perf_counter() - self.started
            if self.process.poll() is not None:
                last = (self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                raise HaloError(f"{self.name} ended before it served: {last}", hint="try its command by hand")
            if time.perf_counter() - self.started > START_SECONDS:
                raise HaloError(f"{self.name} does not serve.", hint=f"it was given {START_SECONDS:.0f} s")
            time.sleep(_POLL)

    def cpu_seconds(self) -> float:
        """Processor time that it took so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """Bytes in memory now: rss, and of it anon (its own) and file (mapped)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        names = {"rss": "VmRSS", "anon": "RssAnon", "file": "RssFile"}
        found = {
            name: re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE) for name, field in names.items()
        }
        return {name: int(match[1]) * 1024 for name, match in found.items() if match}

    def stop(self) -> None:
        """End it, at once if it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def running(name: str, argv: Sequence[str], port: int, log: Path) -> Iterator[Server]:
    """A server while inside."""
    server = Server(name, argv, port, log)
    try:
        yield server
    finally:
        server.stop()


def get(port: int, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """(status, body) of one GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def metrics(port: int) -> dict[str, float]:
    """The series of halo's /metrics that have no other label than the model's name."""
    _, text = get(port, "/metrics")
    found = re.findall(r'^([a-z_:]+)\{model_name="[^"]*"\} (\S+)$', text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def completion(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """A request that decodes exactly so many tokens, in words that halo and llama-server share."""
    return {
        "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "cache_prompt": False, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def stream(port: int, body: dict[str, Any]) -> Streamed:
    """Send a completion and read its stream to the end. HaloError where it is no such stream."""
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
        writer.write(head.encode() + data)
        first, usage, status = 0.0, b"", await reader.readline()
        async for line in reader:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                usage = line if b'"completion_tokens"' in line else usage
            elif b'"error"' in line and not first:
                usage = line
        whole = time.perf_counter() - began
        writer.close()
    if b" 200 " not in status or not usage:
        raise HaloError(
            f"A completion failed: {status.decode(errors='replace').strip()}.", hint=usage.decode()
        )
    counts = json.loads(usage[6:])["usage"]
    return Streamed(first, whole, int(counts["completion_tokens"]))


async def together(port: int, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[Streamed]]:
    """Seconds until all of them are done, and each of them."""
    began = time.perf_counter()
    done = await asyncio.gather(*(stream(port, body) for body in bodies))
    return time.perf_counter() - began, list(done)
