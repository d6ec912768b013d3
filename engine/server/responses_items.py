"""Pieces of an answer to the items of a response, and the events that tell of them, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.sequence import TokenLogprob
from engine.server.reading import Piece
from engine.server.service import new_id
from engine.server.usage import chat_logprobs
from engine.tokenizer import TextTokenizer
from engine.tool_parser import CallDelta

Event = dict[str, Any]


class Items:
    """The output as it grows: messages and function calls, in the order in which they began."""

    def __init__(self, tokenizer: TextTokenizer, *, logprobs: bool) -> None:
        self.output: list[dict[str, Any]] = []
        self._tokenizer, self._with_logprobs = tokenizer, logprobs
        self._open = False  # the last item goes on
        self._texts: list[str] = []  # of the last item, which has them when it is closed

    def add(self, piece: Piece) -> list[Event]:
        """What a piece brings about."""
        events: list[Event] = []
        if piece.text or (piece.finish_reason is not None and not self.output and not piece.calls):
            events += self._text(piece.text, piece.logprobs)
        for call in piece.calls:
            events += self._call(call)
        if piece.finish_reason is not None and self._open:
            events += self._close("incomplete" if piece.finish_reason == "length" else "completed")
        return events

    def so_far(self) -> list[dict[str, Any]]:
        """The output, an open item with what it has."""
        if self._open:
            self._fill(self.output[-1])
        return self.output

    def _fill(self, item: dict[str, Any]) -> None:
        text = "".join(self._texts)
        if item["type"] == "message":
            item["content"][0]["text"] = text
        else:
            item["arguments"] = text

    def _text(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        events: list[Event] = []
        if not (self._open and self.output[-1]["type"] == "message"):
            if self.output and not text.strip():  # between calls
                return []
            events += self._begin_message()
        part = self.output[-1]["content"][0]
        self._texts.append(text)
        scores = chat_logprobs(self._tokenizer, logprobs) if self._with_logprobs else []
        part["logprobs"] += scores
        if text:
            events.append(self._part_event("response.output_text.delta", delta=text, logprobs=scores))
        return events

    def _begin_message(self) -> list[Event]:
        events = self._close() if self._open else []
        message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        events += self._begin(message)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events.append(self._part_event("response.content_part.added", part=part | {"logprobs": []}))
        message["content"] = [part]
        self._texts = []
        return events

    def _call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.name is not None:
            events += self._close() if self._open else []
            item = {
                "id": new_id("fc_"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
            }
            events += self._begin(item)
            self._texts = []
        if call.arguments:
            self._texts.append(call.arguments)
            events.append(self._event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self.output.append(item)
        self._open = True
        at = len(self.output) - 1
        return [{"type": "response.output_item.added", "output_index": at, "item": dict(item)}]

    def _close(self, status: str = "completed") -> list[Event]:
        item = self.output[-1]
        item["status"] = status
        self._open = False
        self._fill(item)
        if item["type"] == "message":
            part = item["content"][0]
            done = self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            events = [done, self._part_event("response.content_part.done", part=part)]
        else:
            arguments = item["arguments"]
            events = [
                self._event("response.function_call_arguments.done", name=item["name"], arguments=arguments)
            ]
        at = len(self.output) - 1
        return [*events, {"type": "response.output_item.done", "output_index": at, "item": item}]

    def _part_event(self, kind: str, **values: object) -> Event:
        return self._event(kind, content_index=0, **values)

    def _event(self, kind: str, **values: object) -> Event:
        at = len(self.output) - 1
        return {"type": kind, "item_id": self.output[at]["id"], "output_index": at, **values}
