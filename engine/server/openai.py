"""The paths of OpenAI's API and of its kin; what answers them is in modules of their own."""

from __future__ import annotations

from engine.server.chat import chat_completions
from engine.server.completions import completions
from engine.server.models import embeddings, model, models
from engine.server.responses import responses
from engine.server.tokens import apply_template, detokenize, tokenize

ROUTES = (
    ("/v1/chat/completions", chat_completions, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/v1/responses", responses, "POST"),
    ("/v1/models", models, "GET"),
    ("/v1/models/{id:path}", model, "GET"),
    ("/v1/embeddings", embeddings, "POST"),
    ("/tokenize", tokenize, "POST"),
    ("/detokenize", detokenize, "POST"),
    ("/apply-template", apply_template, "POST"),
)

__all__ = ["ROUTES", "chat_completions", "completions", "embeddings", "model", "models"]
