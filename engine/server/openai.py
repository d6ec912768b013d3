"""The paths of OpenAI's API and of its kin; what answers them is imported by the first that is asked for."""

from __future__ import annotations

from typing import Final

from engine.server.others import later

chat_completions = later("engine.server.chat", "chat_completions")
completions = later("engine.server.completions", "completions")

ROUTES: Final = (
    ("/v1/chat/completions", chat_completions, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/v1/responses", later("engine.server.responses", "responses"), "POST"),
    ("/v1/models", later("engine.server.models", "models"), "GET"),
    ("/v1/models/{id:path}", later("engine.server.models", "model"), "GET"),
    ("/v1/embeddings", later("engine.server.models", "embeddings"), "POST"),
    ("/tokenize", later("engine.server.tokens", "tokenize"), "POST"),
    ("/detokenize", later("engine.server.tokens", "detokenize"), "POST"),
    ("/apply-template", later("engine.server.tokens", "apply_template"), "POST"),
)
