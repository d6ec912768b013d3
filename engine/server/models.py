"""GET /v1/models and /v1/models/{id}, and why there are no embeddings."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from engine.server.errors import ApiError
from engine.server.service import Service, check_model, json_response, service_of


async def models(request: Request) -> Response:
    """GET /v1/models."""
    return json_response({"object": "list", "data": [_model_object(service_of(request))]})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    service = service_of(request)
    check_model(service, request.path_params["id"])
    return json_response(_model_object(service))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: refused, for a language model's states are no embeddings."""
    raise ApiError(
        400,  # no 5xx: the official clients try those again
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
        "max_model_len": service.engine.context,  # vLLM's name, which clients look for
    }
