"""The figures of constrained decoding in docs/api.md: what a grammar costs in time and memory. No test.

    python3 -m tests.engine.grammar_figures [--tokens 128256] [--model DIR] [--steps 400]

Without --model the vocabulary is made up: 256 bytes, words of lengths as in Llama 3's, 256 special tokens.
Texts are random ones that the masks allow. Times are of the CPU, but for the import.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.chat import stop_ids
from engine.grammar import Grammars, call_grammar, json_grammar, text_grammar
from engine.tokenizer import TextTokenizer, load_tokenizer
from engine.tools import TAGGED, Tool

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}},
        "kind": {"enum": ["a", "b", "c"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}


class MadeUp(TextTokenizer):
    """A vocabulary of any size."""

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(1)
        letters = list('abcdefghijklmnopqrstuvwxyzETAOIN     0123456789{}[]":,._-\n')
        tokens = [bytes([value]) for value in range(256)]
        known = set(tokens)
        while len(tokens) < size - 256:
            word = "".join(rng.choice(letters, int(rng.integers(2, 12)))).encode()
            if word not in known:
                known.add(word)
                tokens.append(word)
        special = range(len(tokens), size)
        super().__init__(
            [*tokens, *(b"<|%d|>" % i for i in special)], special, bos=size - 256, eos=size - 255
        )

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """One token a byte."""
        return list(text.encode())


def resident() -> float:
    """MB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128_256)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model) if given.model else MadeUp(given.tokens)
    began, before = time.perf_counter(), resident()
    import llguidance  # noqa: F401

    print(f"import: {1e3 * (time.perf_counter() - began):.0f} ms, {resident() - before:.0f} MB")
    grammars = Grammars(tokenizer, stop_ids(tokenizer))
    began, before = time.thread_time(), resident()
    grammars.compile(json_grammar({"type": "null"}))
    spent, taken = time.thread_time() - began, resident() - before
    print(f"tables of {tokenizer.size} tokens: {1e3 * spent:.0f} ms, {taken:.0f} MB")
    tools = [Tool("get_weather", "", SCHEMA, strict=True), Tool("get_time")]
    for name, lark in (
        ("a schema", json_grammar(SCHEMA)),
        ("any JSON", json_grammar(None)),
        ("a forced call", call_grammar(tools, TAGGED, parallel=False)),
        ("free text with strict calls", text_grammar(tools, TAGGED, parallel=True)),
    ):
        began = time.thread_time()
        constraint = grammars.compile(lark)
        compiled = time.thread_time() - began
        times, forks = measure(constraint, given.steps)
        print(
            f"{name}: compiled in {1e3 * compiled:.2f} ms, a choice's copy {1e6 * forks:.0f} us; a mask "
            f"{np.mean(times):.3f} ms in the mean, {np.percentile(times, 99):.2f} ms at the 99th "
            f"percentile, {max(times):.2f} ms at most"
        )
    print(f"all in all {resident():.0f} MB in memory")


def measure(constraint: Any, steps: int) -> tuple[list[float], float]:
    """(milliseconds of each mask with the token after it, seconds of a fork)."""
    rng = np.random.default_rng(2)
    began = time.thread_time()
    current = constraint.fork()
    forked = time.thread_time() - began
    times: list[float] = []
    while len(times) < steps:
        began = time.thread_time()
        mask = current.mask()
        spent = time.thread_time() - began
        token = int(rng.choice(np.flatnonzero(mask)))
        began = time.thread_time()
        current.accept(token)
        times.append(1e3 * (spent + time.thread_time() - began))
        if current.finished():
            current = constraint.fork()
    return times, forked


if __name__ == "__main__":
    main()
