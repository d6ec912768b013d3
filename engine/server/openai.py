"""The OpenAI endpoints: a request to queued work, its steps to an answer or a stream; no sockets, no keys."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

import engine.server.service as service_module
from engine.chat import answer_has_leading_space
from engine.server.errors import ApiError, as_api_error, decode_body
from engine.server.runner import Job, Work
from engine.server.schema import MAX_CHOICES, ChatRequest, CompletionRequest
from engine.server.service import (
    EventStream,
    Service,
    check_model,
    collect,
    encode_chat,
    encode_prompt,
    failure,
    json_response,
    read_body,
    service_of,
    sse,
    submit_or_429,
)

COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's default for /v1/completions


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
    service = service_of(request)
    body = decode_body(await read_body(request), ChatRequest)
    check_model(service, body.model)
    body.refuse_unsupported()
    turns = body.turns()
    ids = await encode_chat(service, turns)
    params = body.sampling(body.max_completion_tokens or body.max_tokens)
    strip = answer_has_leading_space(service.engine.card.chat_template)
    works = [Work(ids, params, index=i, seed_index=i, strip_leading=strip) for i in range(body.n or 1)]
    return await _respond(request, body, works, len(ids))


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service = service_of(request)
    body = decode_body(await read_body(request), CompletionRequest)
    check_model(service, body.model)
    body.refuse_unsupported()
    prompts = body.prompts()
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"More than {MAX_CHOICES} choices.", param="prompt", code="invalid_value")
    params = body.sampling(body.max_tokens or COMPLETION_MAX_TOKENS)
    encoded = [await encode_prompt(service, prompt) for prompt in prompts]
    works = [
        Work(ids, params, index=p * n + i, seed_index=i) for p, ids in enumerate(encoded) for i in range(n)
    ]
    return await _respond(request, body, works, sum(len(ids) for ids in encoded))


async def models(request: Request) -> Response:
    """GET /v1/models."""
    service = service_of(request)
    return json_response({"object": "list", "data": [_model_object(service)]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    service = service_of(request)
    check_model(service, request.path_params["id"])
    return json_response(_model_object(service))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: refused, for a language model's states are no embeddings."""
    raise ApiError(
        501,
        "This server has no embedding model; /v1/chat/completions and /v1/completions are served.",
        code="not_implemented",
    )


def _model_object(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "halo",
        "context_length": service.engine.context,
    }


async def _respond(
    request: Request, body: ChatRequest | CompletionRequest, works: list[Work], prompt_tokens: int
) -> Response:
    service = service_of(request)
    job = submit_or_429(request, works)
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
    return EventStream(_events(answer), job) if body.stream else await _whole(answer, request.receive)


async def _whole(answer: Answer, receive: Receive) -> Response:
    """Collect all steps; a client that goes away ends the work."""
    whole = await collect(answer.job, receive)
    choices = [answer.choice(each.index, each.text, each.finish_reason, each.token_ids) for each in whole]
    envelope = answer.envelope("chat.completion" if answer.chat else "text_completion", choices)
    return json_response(envelope | {"usage": answer.usage(sum(each.tokens for each in whole))})


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    """Events of a stream. Tokens without text yet go with the next piece."""
    pending: dict[int, list[int]] = {work.index: [] for work in answer.job.works}
    count = 0
    try:
        if answer.chat:
            for index in pending:
                yield sse(answer.opening(index))
        async for event in answer.job.steps_or_pings(service_module.PING_SECONDS):
            if event is None:
                yield b": ping\n\n"
                continue
            index, step = event
            pending[index].append(step.token_id)
            count += not step.is_end
            if step.text or step.finish_reason:
                yield sse(answer.chunk(index, step.text, step.finish_reason, pending[index]))
                pending[index] = []
        if answer.include_usage:
            yield sse(answer.chunk_of([]) | {"usage": answer.usage(count)})
    except Exception as error:  # the status is sent: the only way left to tell is an event
        yield failure(as_api_error(error))
    yield b"data: [DONE]\n\n"
