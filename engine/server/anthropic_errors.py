"""Errors in Anthropic's form: {type: error, error: {type, message}, request_id}; it decides on no error."""

from __future__ import annotations

from typing import Any, Final

from engine.generate import ContextOverflow
from engine.server.errors import ApiError

KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_error(error: ApiError, request_id: str | None = None) -> dict[str, Any]:
    """The error as Anthropic's clients read it; the field at fault stands before the sentence."""
    kind = KINDS.get(error.status, "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": _message(error)},
        "request_id": request_id,
    }


def _message(error: ApiError) -> str:
    cause = error.__cause__
    if isinstance(cause, ContextOverflow):  # the words by which Claude Code knows that it has to compact
        return f"prompt is too long: {cause.tokens} tokens > {cause.context - 1} maximum"
    return f"{error.param}: {error.message}" if error.param else error.message
