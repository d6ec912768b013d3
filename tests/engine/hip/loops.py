"""The loops of a kernel's machine code: natural loops of its control flow. Not the disassembly.

Blocks of a loop need not lie side by side, and a backward branch need not be a loop: compilers put cold code
behind hot code and return from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Instruction:
    at: int
    text: str
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.text.split()[0]


def _blocks(body: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Basic blocks as ranges of indices into `body`."""
    starts = {0, len(body)}
    index = {instruction.at: n for n, instruction in enumerate(body)}
    for n, instruction in enumerate(body):
        if instruction.name.startswith(("s_cbranch", "s_branch", "s_endpgm", "s_setpc")):
            starts.add(n + 1)
        if instruction.target in index:
            starts.add(index[instruction.target])
    order = sorted(starts)
    return list(pairwise(order))


def _successors(body: Sequence[Instruction], blocks: Sequence[tuple[int, int]]) -> list[list[int]]:
    by_address = {body[first].at: n for n, (first, _) in enumerate(blocks)}
    following = []
    for n, (_, end) in enumerate(blocks):
        last = body[end - 1]
        after = [by_address[last.target]] if last.target in by_address else []
        if not last.name.startswith(("s_branch", "s_endpgm", "s_setpc")) and n + 1 < len(blocks):
            after.append(n + 1)
        following.append(after)
    return following


def _dominators(following: Sequence[Sequence[int]]) -> list[int]:
    """Of each block, the set of blocks that every way to it passes, as the bits of a number."""
    count = len(following)
    before: list[list[int]] = [[] for _ in following]
    for n, after in enumerate(following):
        for m in after:
            before[m].append(n)
    everything = (1 << count) - 1
    found = [1] + [everything] * (count - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, count):
            common = everything
            for m in before[n]:
                common &= found[m]
            new = common | 1 << n
            if new != found[n]:
                found[n], changed = new, True
    return found


def natural_loops(body: Sequence[Instruction]) -> list[tuple[Instruction, ...]]:
    """Every loop's instructions in the order of their addresses; loops of one head are one loop."""
    blocks = _blocks(body)
    following = _successors(body, blocks)
    dominators = _dominators(following)
    before: list[list[int]] = [[] for _ in blocks]
    for n, after in enumerate(following):
        for m in after:
            before[m].append(n)
    loops: dict[int, set[int]] = {}
    for n, after in enumerate(following):
        for head in after:
            if dominators[n] >> head & 1:
                loops.setdefault(head, {head}).update(_reaching(n, head, before))
    return [
        tuple(i for n in sorted(members) for i in body[blocks[n][0] : blocks[n][1]])
        for members in loops.values()
    ]


def _reaching(block: int, head: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing `head`."""
    seen, waiting = {head}, [block]
    while waiting:
        n = waiting.pop()
        if n not in seen:
            seen.add(n)
            waiting += before[n]
    return seen


def innermost(loops: Sequence[tuple[Instruction, ...]]) -> list[tuple[Instruction, ...]]:
    """Those with no other loop inside."""
    places = [frozenset(i.at for i in loop) for loop in loops]
    return [loop for loop, own in zip(loops, places, strict=True) if not any(other < own for other in places)]
