"""Errors in OpenAI's form, and how every kind of failure of a request becomes one; it answers no request."""

from __future__ import annotations

import logging
import re
from typing import Any, Final, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from engine.errors import HaloError
from engine.generate import ContextOverflow
from engine.request import DeadlinePassed

log = logging.getLogger("halo.server")
T = TypeVar("T")
ANTHROPIC: Final = "/v1/messages"  # below it errors have Anthropic's form; elsewhere OpenAI's

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status; `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


def error_body(error: ApiError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}."""
    kind = _KINDS.get(error.status, "server_error")
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code},
    }


def error_response(error: ApiError, scope: Scope | None = None) -> Response:
    """The error as a JSON response, in the form of the API whose path `scope` has."""
    path, state = (scope["path"], scope.get("state", {})) if scope else ("", {})
    if path.startswith(ANTHROPIC):
        from engine.server.anthropic_errors import anthropic_error

        body = anthropic_error(error, state.get("request_id"))
    else:
        body = error_body(error)
    return Response(
        msgspec.json.encode(body),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what a client may see of it; the unforeseen is logged whole and shown as 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflow):
        return ApiError(400, error.message, code="context_length_exceeded")
    if isinstance(error, DeadlinePassed):
        # The official clients ask again after a 5xx, and would only make it worse.
        return ApiError(504, error.message, code="deadline_exceeded", headers={"x-should-retry": "false"})
    if isinstance(error, HTTPException):
        return _http(error)
    log.error("request failed", exc_info=error)
    message = error.message if isinstance(error, HaloError) else "The server failed; its log has the reason."
    return ApiError(500, message, code="internal_error")


async def handle(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything."""
    return error_response(as_api_error(error), request.scope)


def decode_body(body: bytes, kind: type[T]) -> T:
    """The body as a struct of `kind`; raises ApiError naming the field at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _validation(str(error)) from error
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body could not be parsed as JSON: {error}.", code="invalid_json") from error


def _validation(text: str) -> ApiError:
    place = re.search(r" - at (?:`key` in )?`\$\.?([^`]*)`", text)
    missing = re.search(r"missing required field `([^`]*)`", text)
    param = ".".join(found.group(1) for found in (place, missing) if found and found.group(1))
    return ApiError(400, f"{text}.", param=param or None, code="invalid_type")


def _http(error: HTTPException) -> ApiError:
    sentences = {404: "There is no such path.", 405: "This path does not take that method."}
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        error.status_code,
        sentences.get(error.status_code, str(error.detail)),
        code=codes.get(error.status_code),
        headers=dict(error.headers) if error.headers else None,
    )
