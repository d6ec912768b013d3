"""GET /v1/models and /v1/models/{id}, and why there are no embeddings."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from engine.server.errors import ApiError
from engine.server.service import Service, check_model, json_response, service_of

ANTHROPIC_VERSION: Final = "anthropic-version"


async def models(request: Request) -> Response:
    """GET /v1/models; in Anthropic's shape for a client that names its version of that API."""
    if ANTHROPIC_VERSION in request.headers:
        found = _anthropic_object(service_of(request))
        ends = {"first_id": found["id"], "last_id": found["id"], "has_more": False}
        return json_response({"data": [found], **ends})
    return json_response({"object": "list", "data": [_model_object(service_of(request))]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    service = service_of(request)
    check_model(service, request.path_params["id"])
    if ANTHROPIC_VERSION in request.headers:
        return json_response(_anthropic_object(service))
    return json_response(_model_object(service))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: refused, for a language model's states are no embeddings."""
    raise ApiError(
        400,  # no 5xx: the official clients try those again
        "This server has no embedding model; /v1/chat/completions and /v1/completions are served.",
        code="not_implemented",
    )


def _anthropic_object(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "type": "model",
        "display_name": service.model,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "max_input_tokens": service.engine.context - 1,
        "max_tokens": service.engine.context - 1,
    }


def _model_object(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "halo",
        "context_length": service.engine.context,
        "max_model_len": service.engine.context,  # vLLM's name, which clients look for
    }
