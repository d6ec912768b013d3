"""The paths of OpenAI's API and of its kin; what answers them is in modules of their own."""

from __future__ import annotations

from engine.server.chat import chat_completions
from engine.server.completions import completions
from engine.server.models import embeddings, model, models

ROUTES = (
    ("/v1/chat/completions", chat_completions, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/v1/models", models, "GET"),
    ("/v1/models/{id:path}", model, "GET"),
    ("/v1/embeddings", embeddings, "POST"),
)

__all__ = ["ROUTES", "chat_completions", "completions", "embeddings", "model", "models"]
