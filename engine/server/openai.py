"""The OpenAI endpoints: a request to queued work, its steps to an answer or a stream; no sockets, no keys."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from engine.chat import answer_has_leading_space, render
from engine.errors import HaloError
from engine.generate import ContextOverflow, Engine
from engine.locate import Home
from engine.server.errors import ApiError, as_api_error, decode_body, error_body
from engine.server.runner import Job, QueueFull, Runner, Work
from engine.server.schema import MAX_CHOICES, ChatRequest, CompletionRequest

BODY_LIMIT: Final = 2 * 1024 * 1024  # bytes; the longest context of any model is far below
COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions
RETRY_AFTER_SECONDS: Final = 2
PING_SECONDS: Final = 10.0  # proxies and clients give up on a silent stream


@dataclass(frozen=True)
class Service:
    """What the endpoints share."""

    engine: Engine
    runner: Runner
    home: Home
    created: int

    @property
    def model(self) -> str:
        return self.engine.card.name

    @property
    def fingerprint(self) -> str:
        return f"halo-{self.home.version}-{self.home.generation}"


@dataclass(frozen=True)
class Answer:
    """One accepted request: where its steps come from and the form in which they go out."""

    chat: bool
    service: Service
    job: Job
    prompt_tokens: int
    include_usage: bool
    token_ids: bool
    id: str
    created: int

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The object around choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.model,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }

    def choice(self, index: int, text: str, reason: str | None, ids: Sequence[int]) -> dict[str, Any]:
        """A choice of a whole answer."""
        body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, body, reason, ids)

    def chunk(self, index: int, text: str, reason: str | None, ids: Sequence[int]) -> dict[str, Any]:
        """A piece of a stream."""
        body: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self.chunk_of([self._choice(index, body, reason, ids)])

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat stream: the role."""
        body = {"delta": {"role": "assistant", "content": ""}}
        return self.chunk_of([self._choice(index, body, None, ())])

    def chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A stream's object; with usage asked for, every chunk but the last says null."""
        envelope = self.envelope("chat.completion.chunk" if self.chat else "text_completion", choices)
        return envelope | {"usage": None} if self.include_usage else envelope

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Token counts. The model's own end token is in `token_ids`, and not counted here."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _choice(
        self, index: int, body: dict[str, Any], reason: str | None, ids: Sequence[int]
    ) -> dict[str, Any]:
        choice = {"index": index, **body, "logprobs": None, "finish_reason": reason}
        return choice | {"token_ids": list(ids)} if self.token_ids else choice


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.app.state.service
    body = decode_body(await read_body(request), ChatRequest)
    _check_model(service, body.model)
    body.refuse_unsupported()
    turns = body.turns()
    engine = service.engine
    text = "".join(turn.content for turn in turns)
    template = engine.card.chat_template
    ids = await _encode(engine, text, lambda: render(turns, engine.tokenizer, template), "messages")
    params = body.sampling(body.max_completion_tokens or body.max_tokens)
    strip = answer_has_leading_space(template)
    works = [Work(ids, params, index=i, seed_index=i, strip_leading=strip) for i in range(body.n or 1)]
    return await _respond(request, body, works, len(ids))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service: Service = request.app.state.service
    body = decode_body(await read_body(request), CompletionRequest)
    _check_model(service, body.model)
    body.refuse_unsupported()
    prompts = body.prompts()
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"More than {MAX_CHOICES} choices.", param="prompt", code="invalid_value")
    params = body.sampling(body.max_tokens or COMPLETION_MAX_TOKENS)
    encoded = [await _prompt_ids(service.engine, prompt) for prompt in prompts]
    works = [
        Work(ids, params, index=p * n + i, seed_index=i) for p, ids in enumerate(encoded) for i in range(n)
    ]
    return await _respond(request, body, works, sum(len(ids) for ids in encoded))


async def models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    return _json({"object": "list", "data": [_model_object(service)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    service: Service = request.app.state.service
    _check_model(service, request.path_params["id"])
    return _json(_model_object(service))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: refused, for a language model's states are no embeddings."""
    raise ApiError(
        501,
        "This server has no embedding model; /v1/chat/completions and /v1/completions are served.",
        code="not_implemented",
    )


async def read_body(request: Request) -> bytes:
    """The body, at most BODY_LIMIT bytes; what is beyond is read and dropped, so that the refusal arrives."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= BODY_LIMIT:
            parts.append(part)
        elif size > 8 * BODY_LIMIT:
            break
    if size > BODY_LIMIT:
        raise ApiError(413, f"The body is longer than {BODY_LIMIT} bytes.", code="body_too_large")
    return b"".join(parts)


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _model_object(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "halo",
        "context_length": service.engine.context,
    }


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model:
        raise ApiError(
            404,
            f"The model {name!r} does not exist here; this server has {service.model!r}.",
            param="model",
            code="model_not_found",
        )


async def _encode(engine: Engine, text: str, encode: Callable[[], list[int]], param: str) -> list[int]:
    """Token ids, made off the event loop; raises ApiError where they leave no room in the context."""
    fewest = engine.tokenizer.fewest_tokens(text)
    try:
        if fewest >= engine.context:
            raise ContextOverflow(fewest, engine.context, at_least=True)
        ids = await asyncio.to_thread(encode)
        engine.check_prompt(ids)
    except ContextOverflow as error:
        raise ApiError(400, error.message, param=param, code="context_length_exceeded") from error
    except HaloError as error:
        raise ApiError(400, error.message, param=param, code="invalid_value") from error
    return ids


async def _prompt_ids(engine: Engine, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return await _encode(engine, prompt, lambda: engine.encode_prompt(prompt), "prompt")
    return await _encode(engine, "", lambda: prompt, "prompt")


async def _respond(
    request: Request, body: ChatRequest | CompletionRequest, works: list[Work], prompt_tokens: int
) -> Response:
    service: Service = request.app.state.service
    try:
        job = service.runner.submit(works)
    except QueueFull:
        raise ApiError(
            429,
            f"{service.runner.queue_limit} requests are waiting already; try again shortly.",
            code="queue_full",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        ) from None
    chat = isinstance(body, ChatRequest)
    answer = Answer(
        chat=chat,
        service=service,
        job=job,
        prompt_tokens=prompt_tokens,
        include_usage=body.include_usage(),
        token_ids=bool(body.return_token_ids),
        id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
        created=int(time.time()),
    )
    return EventStream(answer) if body.stream else await _whole(answer, request.receive)


async def _whole(answer: Answer, receive: Receive) -> Response:
    """Collect all steps; a client that goes away ends the work."""
    works = answer.job.works
    texts = {work.index: "" for work in works}
    ids: dict[int, list[int]] = {work.index: [] for work in works}
    count = 0
    reasons: dict[int, str | None] = {}
    async with _cancelled_on_disconnect(answer.job, receive):
        async for index, step in answer.job.steps():
            texts[index] += step.text
            ids[index].append(step.token_id)
            count += not step.is_end
            reasons[index] = step.finish_reason
    if any(reasons.get(work.index) is None for work in works):
        raise ClientDisconnect  # cut short, so nobody is there to read it
    choices = [answer.choice(i, texts[i], reasons[i], ids[i]) for i in sorted(texts)]
    envelope = answer.envelope("chat.completion" if answer.chat else "text_completion", choices)
    return _json(envelope | {"usage": answer.usage(count)})


class EventStream(Response):
    """An answer as server-sent events, ended by `data: [DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job = self._answer.job
        async with _cancelled_on_disconnect(job, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in _events(self._answer):
                    await send(_event(event))
            except asyncio.CancelledError:  # the server ends, and this stream has had its time to end before
                await send(_event(error_body(ApiError(503, "The server is shutting down."))))
            await send(_body(b"", more=False))


async def _events(answer: Answer) -> AsyncIterator[dict[str, Any] | bytes]:
    """Events of a stream: objects, and lines as they are. Tokens without text yet go with the next piece."""
    pending: dict[int, list[int]] = {work.index: [] for work in answer.job.works}
    count = 0
    try:
        if answer.chat:
            for index in pending:
                yield answer.opening(index)
        async for event in answer.job.steps_or_pings(PING_SECONDS):
            if event is None:
                yield b": ping"
                continue
            index, step = event
            pending[index].append(step.token_id)
            count += not step.is_end
            if step.text or step.finish_reason:
                yield answer.chunk(index, step.text, step.finish_reason, pending[index])
                pending[index] = []
        if answer.include_usage:
            yield answer.chunk_of([]) | {"usage": answer.usage(count)}
    except Exception as error:  # the status is sent: the only way left to tell is an event
        yield error_body(as_api_error(error))
    yield b"data: [DONE]"


def _event(event: dict[str, Any] | bytes) -> AsgiMessage:
    line = b"data: " + msgspec.json.encode(event) if isinstance(event, dict) else event
    return _body(line + b"\n\n", more=True)


def _body(data: bytes, *, more: bool) -> AsgiMessage:
    return {"type": "http.response.body", "body": data, "more_body": more}


@contextlib.asynccontextmanager
async def _cancelled_on_disconnect(job: Job, receive: Receive) -> AsyncIterator[None]:
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
