"""What all API modules share: the served model, bodies, prompts, queued work, streams; no API's own words."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from engine.chat import Message, render, stop_ids
from engine.errors import HaloError
from engine.generate import ContextOverflow, Engine
from engine.locate import Home
from engine.router import NpuProbe
from engine.server.errors import ApiError, as_api_error, error_body
from engine.server.request_stats import StatsObserver
from engine.server.runner import Job, QueueFull, Runner, Work
from engine.tools import Tool

if TYPE_CHECKING:
    from engine.grammar import Grammars

BODY_LIMIT: Final = 2 * 1024 * 1024  # bytes; the longest context of any model is far below
RETRY_AFTER_SECONDS: Final = 2
DONE: Final = b"data: [DONE]\n\n"  # the end of a stream of OpenAI's older endpoints
PING: Final = b": ping\n\n"
PING_SECONDS: Final = 10.0  # proxies and clients give up on a silent stream


@dataclass(frozen=True)
class Service:
    """What the endpoints share."""

    engine: Engine
    runner: Runner
    home: Home
    created: int
    stats: StatsObserver = field(default_factory=StatsObserver)  # the scheduler's observer, or around it
    npu: NpuProbe | None = None  # what the checks know of the NPU, asked in a thread
    deadline: float | None = None  # seconds that a request may take, waiting included

    @property
    def model(self) -> str:
        return self.engine.card.name

    @property
    def fingerprint(self) -> str:
        return f"halo-{self.home.version}-{self.home.generation}"

    @cached_property
    def grammars(self) -> Grammars:
        """What makes constraints; nothing is loaded before one is compiled."""
        from engine.grammar import Grammars

        return Grammars(self.engine.tokenizer, stop_ids(self.engine.tokenizer))


def service_of(request: Request) -> Service:
    """The service that answers this request."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Whom the scheduler is fair to: what the middleware says (a key's digest), else the peer's address."""
    client = request.scope.get("state", {}).get("client")
    return str(client) if client else (request.client.host if request.client else "")


def new_id(prefix: str) -> str:
    """An id that no other answer has."""
    return prefix + secrets.token_hex(16)


async def read_body(request: Request, limit: int = BODY_LIMIT) -> bytes:
    """The body, at most `limit` bytes; what is beyond is read and dropped, so that the refusal arrives."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 8 * limit:
            break
    if size > limit:
        raise ApiError(413, f"The body is longer than {limit} bytes.", code="body_too_large")
    return b"".join(parts)


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as a JSON response."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event; `data` is encoded as JSON."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + msgspec.json.encode(data) + b"\n\n"


def check_model(service: Service, name: str | None, param: str = "model") -> None:
    """Raise ApiError (404) on the name of a model that is not served; None is whatever is."""
    if name is not None and name != service.model:
        raise ApiError(
            404,
            f"The model {name!r} does not exist here; this server has {service.model!r}.",
            param=param,
            code="model_not_found",
        )


async def encode_chat(
    service: Service, turns: Sequence[Message], tools: Sequence[Tool] = (), param: str = "messages"
) -> list[int]:
    """A conversation's token ids, up to where the answer begins; made off the event loop."""
    engine = service.engine
    text = "".join(turn.content for turn in turns)
    template = engine.card.chat_template
    return await encode(service, text, lambda: render(turns, engine.tokenizer, template, tools), param)


async def encode_prompt(service: Service, prompt: str | list[int], param: str = "prompt") -> list[int]:
    """A prompt's token ids: of a text with what opens one, of ids as they are; made off the event loop."""
    if isinstance(prompt, str):
        return await encode(service, prompt, lambda: service.engine.encode_prompt(prompt), param)
    return await encode(service, "", lambda: prompt, param)


async def encode(service: Service, text: str, make: Callable[[], list[int]], param: str) -> list[int]:
    """What `make` gives, called in a thread; raises ApiError where it leaves no room in the context.

    `text` is what is surely in the prompt: one that cannot fit is refused before it is encoded.
    """
    engine = service.engine
    fewest = engine.tokenizer.fewest_tokens(text)
    try:
        if fewest >= engine.context:
            raise ContextOverflow(fewest, engine.context, at_least=True)
        ids = await asyncio.to_thread(make)
        engine.check_prompt(ids)
    except ContextOverflow as error:
        raise too_long(error, param) from error
    except HaloError as error:
        raise ApiError(400, error.message, param=param, code="invalid_value") from error
    return ids


def too_long(error: ContextOverflow, param: str | None = None) -> ApiError:
    """A prompt that does not fit, in the words that clients of OpenAI's API look for."""
    few = "at least " if "at least" in error.message else ""
    return ApiError(
        400,
        f"This model's maximum context length is {error.context} tokens. However, your {param or 'prompt'} "
        f"resulted in {few}{error.tokens} tokens. Please shorten it: one new token must have room.",
        param=param,
        code="context_length_exceeded",
    )


def submit_or_429(request: Request, works: Sequence[Work]) -> Job:
    """Queue a request's work; raises ApiError (429) where too many wait."""
    service = service_of(request)
    runner = service.runner
    deadline = None if service.deadline is None else time.monotonic() + service.deadline
    try:
        job = runner.submit(works, client=client_of(request), deadline=deadline)
    except QueueFull:
        raise ApiError(
            429,
            f"{runner.queue_limit} requests are waiting already; try again shortly.",
            code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        ) from None
    request.scope.setdefault("state", {}).setdefault("jobs", []).append(job)  # for the access log
    return job


def failure(error: ApiError) -> bytes:
    """An error as OpenAI's event of a stream."""
    return sse(error_body(error))


class EventStream(Response):
    """Server-sent events made from a job's steps; a client that goes away cancels the job.

    The status is sent before the first event, so an exception while events are made is told by one more:
    what `failed` makes of it. `failed` is asked too when the server ends meanwhile.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], job: Job, failed: Callable[[ApiError], bytes] = failure
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._job, self._failed = events, job, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_disconnect(self._job, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await send(_body(event, more=True))
            except asyncio.CancelledError:  # the server ends, and this stream has had its time to end before
                await send(_body(self._failed(ApiError(503, "The server is shutting down.")), more=True))
            except Exception as error:
                await send(_body(self._failed(as_api_error(error)), more=True))
            await send(_body(b"", more=False))


def _body(data: bytes, *, more: bool) -> AsgiMessage:
    return {"type": "http.response.body", "body": data, "more_body": more}


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(job: Job, receive: Receive) -> AsyncIterator[None]:
    """While inside, a client that goes away cancels the job; leaving cancels what is left of it."""
    watcher = asyncio.create_task(_watch(job, receive))
    try:
        yield
    finally:
        watcher.cancel()
        job.cancel()


async def _watch(job: Job, receive: Callable[[], Awaitable[AsgiMessage]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()
