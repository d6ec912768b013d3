"""Whether a tokenizer's merges make tiktoken and the library that they are from encode alike. No encoder.

The library (huggingface/tokenizers, and llama.cpp) joins a pair that the merges list, the one listed first
before all others; tiktoken joins any two tokens that make a third, the one of least id first; both the
leftmost of equals.

Why the check below suffices. Where a text came to two neighbours whose bytes together are token X, no join
so far crossed the ends of X. So what happened between them is what encoding the bytes of X alone does, up to
its last two parts: each join there was the least of all, and so of those between the ends. Hence X has one
pair of parts in every text. If the merges list that pair for each X, in the order of the ids, both sides
have the same pairs to choose from at each step, and choose alike. A token whose own bytes never come to two
parts is never joined; it is found only as a whole word, which tiktoken looks up first, and the library where
`ignore_merges` says so. Llama-3's vocabulary has 588 of these, and 90 that are joined after tokens of
greater id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Final

MAX_WORK: Final = 100_000_000  # the sum of the squares of the tokens' lengths; Llama-3's is near 10 million
MAX_TOKEN: Final = 1024  # bytes of a token, whose check takes their square; Llama-3's longest has 128
NONE: Final = 1 << 62  # the rank of a pair that makes no token


def difference(
    tokens: Sequence[bytes],
    special: Collection[int],
    merges: Sequence[tuple[int, int, int]],
    *,
    ignore_merges: bool,
) -> str:
    """Why some text might get other ids from tiktoken than from the library; empty where none can."""
    ranks = {token: i for i, token in enumerate(tokens) if token and i not in special}
    sizes = [len(token) for token in ranks]
    if max(sizes, default=0) > MAX_TOKEN or sum(size * size for size in sizes) > MAX_WORK:
        return "its tokens are longer than any language's"
    listed = {(tokens[left], tokens[right]): rank for rank, (left, right, _) in enumerate(merges)}
    last = -1
    for token, index in ranks.items():
        if len(token) == 1:
            continue
        parts = last_parts(token, ranks)
        if len(parts) > 2:
            if not ignore_merges:
                return f"its merges never come to token {index}"
            continue
        rank = listed.get((parts[0], parts[1]))
        if rank is None:
            return f"its merges do not list the parts of token {index}"
        if rank < last:
            return f"its merges join token {index} before one of lesser id"
        last = rank
    return ""


def last_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What byte-pair encoding makes of a token's bytes before it joins the last two parts."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, NONE) for left, right in pairwise(parts)]
        least = min(joined)
        if least == NONE:
            break
        at = joined.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
