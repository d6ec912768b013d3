"""What the system before this one served beside OpenAI's API: POST /ppl and GET /v1/npu/status."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine import router
from engine.errors import HaloError
from engine.ppl import Protocol, Scores, Window, plan
from engine.sampling import SamplingParams
from engine.sequence import Prompt
from engine.server.errors import ApiError, decode_body
from engine.server.runner import Work
from engine.server.service import (
    Service,
    cancelled_on_disconnect,
    json_response,
    read_body,
    service_of,
    submit_or_429,
)

MOST_WINDOWS: Final = 512
SCORING: Final = SamplingParams(max_tokens=0, prompt_logprobs=0)


class PplRequest(msgspec.Struct):
    """`stride` tokens from one window's start to the next; `window` tokens each, at most the context."""

    text: str
    stride: Annotated[int, Meta(ge=1)] = 1024
    max_tokens: Annotated[int, Meta(ge=1)] = 8192
    window: Annotated[int, Meta(ge=1)] | None = None


async def ppl(request: Request) -> Response:
    """POST /ppl: the text's perplexity as `halo ppl` defines it (engine/ppl.py)."""
    service = service_of(request)
    body = decode_body(await read_body(request), PplRequest)
    began = time.monotonic()
    protocol = _protocol(service, body)
    tokens = (await asyncio.to_thread(service.engine.tokenizer.encode, body.text))[: body.max_tokens]
    windows = _windows(tokens, protocol)
    scores = await _score(request, tokens, windows, protocol)
    nats, perplexity = scores.nats_per_token, scores.perplexity
    return json_response(
        {
            "mean_nll": nats,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "tokens": scores.tokens,
            "elapsed_ms": round((time.monotonic() - began) * 1000, 3),
            "window": protocol.window,
            "stride": protocol.stride,
            "windows": len(windows),
        }
    )


def _protocol(service: Service, body: PplRequest) -> Protocol:
    """The window is the stride unless it is given, as the predecessor's; BOS and one more must fit beside."""
    most = service.engine.context - 2
    if body.window is not None and body.window > most:
        raise ApiError(
            400,
            f"A window of {body.window} tokens does not fit: at most {most} do.",
            param="window",
            code="invalid_value",
        )
    window = min(body.stride, most) if body.window is None else body.window
    return Protocol(window, min(body.stride, window), service.engine.tokenizer.bos)


def _windows(tokens: list[int], protocol: Protocol) -> list[Window]:
    try:
        windows = plan(len(tokens), protocol)
    except HaloError as error:
        raise ApiError(400, error.message, param="text", code="invalid_value") from error
    if len(windows) > MOST_WINDOWS:
        raise ApiError(
            400,
            f"This text makes {len(windows)} windows; at most {MOST_WINDOWS} are scored in one request.",
            param="stride",
            code="invalid_value",
        )
    return windows


async def _score(request: Request, tokens: list[int], windows: list[Window], protocol: Protocol) -> Scores:
    """Every window through the scheduler, beside what else runs."""
    assert protocol.bos is not None
    works = [
        Work([protocol.bos, *tokens[window.start : window.end]], SCORING, index=i)
        for i, window in enumerate(windows)
    ]
    nats: dict[int, float] = {}
    job = submit_or_429(request, works)
    async with cancelled_on_disconnect(job, request.receive):
        async for index, event in job.steps():
            if isinstance(event, Prompt):
                nats[index] = _nats(event, windows[index])
    if len(nats) < len(windows):
        raise ClientDisconnect  # cut short, so nobody is there to read it
    counts = tuple(window.end - window.first for window in windows)
    return Scores(tuple(nats[index] for index in range(len(windows))), counts)


def _nats(prompt: Prompt, window: Window) -> float:
    """Of the tokens that this window scores; its prompt is BOS and then all its tokens."""
    scored = prompt.logprobs[1 + window.first - window.start :]
    return -math.fsum(one.logprob for one in scored if one is not None)


async def npu_status(request: Request) -> Response:
    """GET /v1/npu/status: which backend runs which phase, and what the checks know of the NPU."""
    service = service_of(request)
    npu = await asyncio.to_thread(service.npu) if service.npu else router.UNCHECKED
    found = {route.phase: route for route in router.routes(service.engine.facts, npu)}
    prefill = found["prefill"]
    error = dict(prefill.passed_over).get("npu")
    return json_response(
        {
            "backend": service.engine.facts.get("backend"),
            "ready": prefill.target == "npu",
            "reason": error or "",
            "kernel": router.npu_kernel(),
            "routes": {phase: _shown(route) for phase, route in found.items()},
            "device_node_present": npu.device_node_present,
            "memlock_unlimited": npu.memlock_unlimited,
            "xrt_smi_installed": npu.tool_installed,
            "npu_firmware_version": npu.firmware_version,
            "amdxdna_loaded": npu.driver_loaded,
            "error": error,
            "advisories": list(npu.advisories),
        }
    )


def _shown(route: router.Route) -> dict[str, Any]:
    return {
        "target": route.target,
        "passed_over": [{"target": target, "reason": reason} for target, reason in route.passed_over],
    }
