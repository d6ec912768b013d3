"""The server under load: clients that leave, clients that misbehave, a day's traffic in miniature.

Speeds are printed (pytest -s) and never asserted. HALO_TEST_SLOW=1 sends 100,000 requests instead of 2,000.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import struct
import threading
import time
from collections import Counter

import pytest

from engine.bench_stream import completion

LEAVING = 1000
TRAFFIC = 2000
MEGABYTE = 1 << 20
PROMPT = list(range(40, 60))


def request(body: bytes, *, keep: bool = False, extra: str = "") -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{extra}"
    return (head + ("" if keep else "connection: close\r\n") + "\r\n").encode() + body


async def leave(port: int, index: int) -> int:
    """Read the beginning of a long stream and go, half of the clients by FIN, half by RST."""
    body = completion([*PROMPT, index % 200 + 2], 900)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(json.dumps(body).encode()))
    seen = 0
    while seen < 2 and (line := await reader.readline()):
        assert b" 429 " not in line
        seen += line.startswith(b"data: {")
    if index % 2:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return seen


async def leaving(port: int, first: int, count: int, at_once: int = 24) -> int:
    gate = asyncio.Semaphore(at_once)

    async def one(index: int) -> int:
        async with gate:
            return await leave(port, index)

    return sum(await asyncio.gather(*(one(first + index) for index in range(count))))


def test_a_thousand_clients_leave_in_the_middle_and_nothing_is_left_of_them(loaded):
    asyncio.run(leaving(loaded.port, 0, LEAVING // 4))
    loaded.settle()
    memory, descriptors = loaded.own_memory(), loaded.descriptors()
    seen = asyncio.run(leaving(loaded.port, LEAVING // 4, LEAVING - LEAVING // 4))
    loaded.settle()
    found = loaded.samples()
    ended = found["halo_requests_ended_total", (("reason", "cancelled"),)]
    made = found["vllm:generation_tokens_total", ()]
    grown = loaded.own_memory() - memory
    print(f"{ended:.0f} left; {made / LEAVING:.1f} tokens made for each; own memory {grown / 1e6:+.1f} MB")
    assert ended == LEAVING == found["halo_requests_submitted_total", ()]
    assert seen == 2 * (LEAVING - LEAVING // 4)
    assert made < 100 * LEAVING  # of 900 each: nobody was generated for to the end
    assert loaded.descriptors() <= descriptors + 1
    assert grown < 8 * MEGABYTE
    slots = found["halo_slots", ()]
    bodies = [json.dumps(completion([3 + k, 9], 4)).encode() for k in range(int(slots))]
    assert all(status == 200 for status, _ in asyncio.run(answers(loaded.port, bodies)))


async def answers(port: int, bodies: list[bytes]) -> list[tuple[int, bytes]]:
    return await asyncio.gather(*(ask(port, request(body)) for body in bodies))


async def ask(port: int, data: bytes) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own; (0, b"") where there was no answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        with contextlib.suppress(OSError):
            writer.write(data)
            await writer.drain()
        answer = await reader.read()
    except OSError:
        return 0, b""
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head[9:12] or 0), body


# --- bad clients


def _slow_reader() -> bytes:
    return request(json.dumps(completion(PROMPT, 900)).encode())


BAD = {
    "huge header": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * MEGABYTE + b"\r\n\r\n",
        {400, 0},
    ),
    "50 MB body": (request(b" " * (50 * MEGABYTE)), {413, 0}),
    "invalid UTF-8": (request(b'{"prompt": "\xff\xfe"}'), {400}),
    "deep JSON": (request(b"[" * 200_000), {400}),
    "deep value": (request(b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), {400}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 100, {400, 0}),
}


async def bad(port: int, kind: str, stop: asyncio.Event, seen: Counter) -> None:
    """One bad client, over and over until told to stop."""
    while not stop.is_set():
        if kind in BAD:
            data, expected = BAD[kind]
            status, _ = await ask(port, data)
            assert status in expected, (kind, status)
        else:  # it says half of what it should, or reads nothing of what it asked for
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(_slow_reader() if kind == "slow reader" else _slow_reader()[:-9])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
            writer.close()
        seen[kind] += 1
        await asyncio.sleep(0.05)


async def good(port: int, count: int) -> tuple[list[float], set[bytes]]:
    body = json.dumps(completion(PROMPT, 8) | {"stream": False}).encode()
    seconds, texts = [], set()
    for _ in range(count):
        began = time.perf_counter()
        status, answer = await ask(port, request(body))
        seconds.append(time.perf_counter() - began)
        assert status == 200, answer
        texts.add(json.loads(answer)["choices"][0]["text"].encode())
    return seconds, texts


async def crowd(port: int, stop: asyncio.Event, seen: Counter) -> None:
    kinds = [*BAD, "slow reader", "half a request"] * 3
    assert len(kinds) == 24
    await asyncio.gather(*(bad(port, kind, stop, seen) for kind in kinds))


class Crowd(threading.Thread):
    """24 bad clients in a loop of their own, so that the good ones' clock does not stand for them."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.seen, self.error = port, Counter(), None
        self.loop, self.stop = asyncio.new_event_loop(), asyncio.Event()

    def run(self) -> None:
        try:
            self.loop.run_until_complete(crowd(self.port, self.stop, self.seen))
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.join(60)
        self.loop.close()
        if self.error is not None:
            raise self.error


def test_24_bad_clients_at_once_and_the_good_ones_are_answered(loaded):
    before = loaded.descriptors()
    alone, said = asyncio.run(good(loaded.port, 20))
    crowd = Crowd(loaded.port)
    crowd.start()
    time.sleep(1)
    among, said_too = asyncio.run(good(loaded.port, 20))
    crowd.end()
    loaded.settle()
    ratio = statistics.median(among) / statistics.median(alone)
    print(
        f"a good request took {statistics.median(alone) * 1e3:.0f} ms alone and {ratio:.1f} times that among "
        f"{dict(crowd.seen)}; clients and server share the CPUs, and slow readers' answers are decoded too"
    )
    assert len(said | said_too) == 1, "an answer depended on who else was there"
    assert len(crowd.seen) == len(BAD) + 2
    assert loaded.server.process.poll() is None
    assert loaded.descriptors() <= before + 2


# --- a day's traffic


async def traffic(port: int, count: int, at_once: int = 12) -> Counter:
    """Short requests on connections that are kept; how often each status came."""
    left, statuses = iter(range(count)), Counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in left:
            body = completion([2 + index % 250, 2 + index // 250 % 250], 1 + index % 3) | {
                "stream": index % 4 == 0
            }
            writer.write(request(json.dumps(body).encode(), keep=True))
            head = await reader.readuntil(b"\r\n\r\n")
            statuses[int(head[9:12])] += 1
            if b"chunked" in head:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"
                )
                await reader.readexactly(length)
        writer.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return statuses


def _no_growth(loaded, count: int) -> None:
    asyncio.run(traffic(loaded.port, min(1000, count // 4)))
    loaded.settle()
    memory, descriptors = loaded.own_memory(), loaded.descriptors()
    began = time.perf_counter()
    statuses = asyncio.run(traffic(loaded.port, count))
    seconds = time.perf_counter() - began
    loaded.settle()
    grown = loaded.own_memory() - memory
    print(f"{count} requests in {seconds:.0f} s, {count / seconds:.0f}/s; own memory {grown / 1e6:+.1f} MB")
    assert statuses == {200: count}
    assert grown < 8 * MEGABYTE
    assert loaded.descriptors() <= descriptors + 1
    found = loaded.samples()
    assert found["halo_requests_ended_total", (("reason", "error"),)] == 0
    assert found["halo_requests_refused_total", ()] == 0


def test_traffic_leaves_nothing_behind(loaded):
    _no_growth(loaded, TRAFFIC)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_day_s_traffic_leaves_nothing_behind(loaded):
    _no_growth(loaded, int(os.environ.get("HALO_TEST_REQUESTS", "100000")))
