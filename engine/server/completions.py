"""POST /v1/completions: continues texts or token ids; `echo` and `logprobs` in the endpoint's own shape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

import engine.server.service as shared
from engine.sequence import Prompt, TokenLogprob
from engine.server.errors import ApiError, as_api_error, decode_body
from engine.server.fields import COMPLETIONS, refuse
from engine.server.reading import ChoiceReader, Piece, Whole, gather, likeliest, pieces
from engine.server.runner import Job, Work
from engine.server.schema import MAX_CHOICES, Choices, Common, Top, answer_schema
from engine.server.service import (
    EventStream,
    Service,
    check_model,
    encode_prompt,
    failure,
    json_response,
    new_id,
    read_body,
    service_of,
    sse,
    submit_or_429,
)
from engine.server.turn import answer_constraint
from engine.server.usage import legacy_logprobs, usage

MAX_TOKENS: Final = 16  # OpenAI's default


class CompletionRequest(Common, kw_only=True):
    """The body."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    logprobs: Top | None = None
    echo: bool | None = None
    best_of: Choices | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts: one string, several, one list of token ids, or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [p for p in self.prompt if isinstance(p, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if ids:
            raise ApiError(
                400, "prompt mixes token ids with strings or lists.", param="prompt", code="invalid_type"
            )
        return [p for p in self.prompt if not isinstance(p, int)]

    def candidates(self) -> int:
        """Choices to generate for each prompt: best_of of them where it is more than n."""
        n = self.n or 1
        best_of = self.best_of or n
        if best_of < n or (best_of > n and self.stream):
            why = "best_of must be at least n" if best_of < n else "best_of cannot be streamed"
            raise ApiError(400, f"{why}.", param="best_of", code="invalid_value")
        return best_of


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service = service_of(request)
    data = await read_body(request)
    body = decode_body(data, CompletionRequest)
    check_model(service, body.model)
    refuse(COMPLETIONS, data)
    each = body.candidates()
    prompts = body.prompts()
    if len(prompts) * each > MAX_CHOICES:
        raise ApiError(400, f"More than {MAX_CHOICES} choices.", param="prompt", code="invalid_value")
    encoded = [await encode_prompt(service, prompt) for prompt in prompts]
    works = await _works(service, body, encoded, each)
    answer = Answer(service, submit_or_429(request, works), body, prompts, encoded, each)
    if body.stream:
        return EventStream(answer.events(), answer.job)
    choices = await gather(answer.job, answer.reader, request.receive)
    if body.logprobs is None:
        return json_response(answer.whole(choices))
    return await asyncio.to_thread(lambda: json_response(answer.whole(choices)))  # long ones take a while


async def _works(
    service: Service, body: CompletionRequest, encoded: Sequence[list[int]], each: int
) -> list[Work]:
    schema = answer_schema(body.response_format, "response_format")
    constraint = await answer_constraint(service, schema)
    limit = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    ranked = 0 if each > (body.n or 1) else None
    logprobs = ranked if body.logprobs is None else body.logprobs
    echoed = body.logprobs if body.echo else None
    params = body.sampling(limit, service.engine.tokenizer.size, logprobs, echoed)
    return [
        Work(
            ids,
            # Once is enough, for the other choices of a prompt have the same; a stream begins with any.
            params if i == 0 or body.stream else replace(params, prompt_logprobs=None),
            index=number * each + i,
            seed_index=i,
            constraint=constraint,
        )
        for number, ids in enumerate(encoded)
        for i in range(each)
    ]


@dataclass
class Answer:
    """One accepted request and the form in which its answer goes out."""

    service: Service
    job: Job
    body: CompletionRequest
    prompts: Sequence[str | list[int]]
    encoded: Sequence[list[int]]
    each: int  # choices of a prompt

    def __post_init__(self) -> None:
        self._head = {"id": new_id("cmpl-"), "created": int(time.time())}
        self._at: dict[int, int] = {}  # characters of each choice that are out
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}  # by number of the prompt

    def reader(self) -> ChoiceReader:
        """A reader of one choice; its log probabilities have the end token's too, as lm-eval counts them."""
        return ChoiceReader(self.service.engine.tokenizer, with_end=True)

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """The answer in one piece."""
        tokens = sum(whole.tokens for whole in wholes)
        n = self.body.n or 1
        choices = []
        for number in range(len(self.encoded)):
            mine = wholes[number * self.each : (number + 1) * self.each]
            self._prompt_logprobs[number] = mine[0].prompt_logprobs
            for i, whole in enumerate(likeliest(mine, n) if self.each > n else mine):
                choices.append(self._choice(number, number * n + i, whole))
        return self._envelope(choices) | {"usage": self._usage(tokens)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as a stream; with echo, each choice begins with its prompt."""
        tokens = 0
        try:
            async for event in pieces(self.job, self.reader, shared.PING_SECONDS):
                if event is None:
                    yield shared.PING
                    continue
                index, piece = event
                if isinstance(piece, Prompt):
                    self._prompt_logprobs[index // self.each] = piece.logprobs
                    continue
                if self.body.echo and index not in self._at:
                    yield sse(self._chunk([self._echo(index)]))
                tokens += piece.tokens
                yield sse(self._chunk([self._piece(index, piece)]))
            if self.body.include_usage():
                yield sse(self._chunk([]) | {"usage": self._usage(tokens)})
        except Exception as error:  # the status is sent: the only way left to tell is an event
            yield failure(as_api_error(error))
        yield shared.DONE

    def _choice(self, number: int, index: int, whole: Whole) -> dict[str, Any]:
        head = self._prompt_text(number) if self.body.echo else ""
        scored = self._prompt_scores(number) if self.body.echo else []
        logprobs = self._legacy(scored, 0)
        if logprobs is not None:
            own = self._legacy([(each.token_id, each) for each in whole.logprobs], len(head)) or {}
            logprobs = {name: values + own[name] for name, values in logprobs.items()}
        return self._form(index, head + whole.text, logprobs, whole.finish_reason, whole.token_ids)

    def _echo(self, index: int) -> dict[str, Any]:
        number = index // self.each
        text = self._prompt_text(number)
        self._at[index] = len(text)
        return self._form(index, text, self._legacy(self._prompt_scores(number), 0), None, ())

    def _piece(self, index: int, piece: Piece) -> dict[str, Any]:
        at = self._at.get(index, 0)
        self._at[index] = at + len(piece.text)
        logprobs = self._legacy([(each.token_id, each) for each in piece.logprobs], at)
        return self._form(index, piece.text, logprobs, piece.finish_reason, piece.token_ids)

    def _prompt_text(self, number: int) -> str:
        prompt = self.prompts[number]
        return prompt if isinstance(prompt, str) else self.service.engine.tokenizer.decode(prompt)

    def _prompt_scores(self, number: int) -> list[tuple[int, TokenLogprob | None]]:
        """A prompt's tokens with their log probabilities; the first has none."""
        ids = self.encoded[number]
        known = self._prompt_logprobs.get(number) or [None] * len(ids)
        return list(zip(ids, known, strict=True))

    def _legacy(
        self, scored: Sequence[tuple[int, TokenLogprob | None]], offset: int
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        return legacy_logprobs(self.service.engine.tokenizer, scored, offset)

    def _form(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        ids: Sequence[int],
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return choice | ({"token_ids": ids} if self.body.return_token_ids else {})

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        return usage(self.job, sum(len(ids) for ids in self.encoded), completion_tokens)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A stream's object; with usage asked for, every chunk but the last says null."""
        envelope = self._envelope(choices)
        return envelope | {"usage": None} if self.body.include_usage() else envelope

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "text_completion",
            "model": self.service.model,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }
