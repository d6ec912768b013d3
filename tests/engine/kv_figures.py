"""The figures of docs/kv-cache.md: what the forms of the KV cache cost in quality, time and memory. No test.

    HALO_LIB_DIR=BUILD python3 -m tests.engine.kv_figures quality MODEL TEXT [--window N] [--windows K]
    HALO_LIB_DIR=BUILD python3 -m tests.engine.kv_figures speed MODEL [--context N] [--threads N]

MODEL is a model directory (quality), or a prepared file (speed: the weights do not matter). BUILD is a build
of engine/native. All forms run in turns on the same tokens, so that their differences are paired.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.backend import KV_FORMS, NativeModel, Session
from engine.tokenizer import load_tokenizer

AT_ONCE = 256  # positions of one request


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def score(sessions: dict[str, Session], fed: list[int], after: list[int]) -> NDArray[np.float64]:
    """[forms, 3] sums over a window: nats, KL divergence from f32's distribution, arg max equal to f32's."""
    sums = np.zeros((len(sessions), 3))
    for low in range(0, len(fed), AT_ONCE):
        places = range(low, min(low + AT_ONCE, len(fed)))
        n, first = len(places), None
        for index, session in enumerate(sessions.values()):
            rows = log_softmax(session.run([fed[i] for i in places], [0] * n, places, [True] * n))
            first = rows if first is None else first
            nats = -rows[np.arange(n), [after[i] for i in places]].sum()
            apart = (np.exp(first) * (first - rows)).sum()
            sums[index] += nats, apart, (rows.argmax(axis=1) == first.argmax(axis=1)).sum()
    return sums


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def quality(args: argparse.Namespace) -> None:
    """Windows spread evenly over the text, each from an empty cache, after BOS."""
    tokenizer = load_tokenizer(args.model)
    tokens = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    starts = np.arange(len(tokens) // args.window) * args.window
    starts = starts[np.linspace(0, len(starts) - 1, args.windows).astype(int)]
    with ExitStack() as stack:
        model = stack.enter_context(NativeModel.open(args.model / "model.halo"))
        sessions = {
            form: stack.enter_context(model.session(context=args.window, threads=args.threads, kv=form))
            for form in KV_FORMS
        }
        done = []
        for start in starts.tolist():
            window = tokens[start : start + args.window]
            done.append(score(sessions, [tokenizer.bos, *window[:-1]], window) / args.window)
            if len(done) > 1:
                report(np.stack(done), args.window)


def report(done: NDArray[np.float64], window: int) -> None:
    """`done` [windows, forms, 3], means over each window's tokens."""
    print(f"\n{len(done)} windows of {window} tokens")
    for index, form in enumerate(KV_FORMS):
        nats, _ = mean_and_error(done[:, index, 0])
        more, error = mean_and_error(done[:, index, 0] - done[:, 0, 0])
        apart, apart_error = mean_and_error(done[:, index, 1])
        same = 100 * done[:, index, 2].mean()
        print(
            f"{form:7} perplexity {np.exp(nats):.4f}  nats {nats:.5f}  beyond f32 {more:+.6f} +- {error:.6f}"
            f"  KL {apart:.2e} +- {apart_error:.0e}  same arg max {same:.2f} %",
            flush=True,
        )


def fill(session: Session, form: str, tokens: list[int]) -> None:
    """Run all tokens from position 0 and say how fast."""
    started = time.perf_counter()
    for low in range(0, len(tokens), AT_ONCE):
        part = tokens[low : low + AT_ONCE]
        session.run_argmax(part, [0] * len(part), range(low, low + len(part)), [False] * len(part))
    took = time.perf_counter() - started
    print(f"{form:7} prefill of {len(tokens)}: {len(tokens) / took:.1f} tokens/s", flush=True)


def speed(args: argparse.Namespace) -> None:
    """Median time of a token that follows `context` others: some of each form in turn, some rounds."""
    sessions: dict[str, Session] = {}
    times: dict[str, list[float]] = {form: [] for form in args.forms}
    with ExitStack() as stack:
        model = stack.enter_context(NativeModel.open(args.model))
        room = args.context + args.tokens
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, room).tolist()
        for form in args.forms:
            made = model.session(context=room, threads=args.threads, kv=form)
            sessions[form] = stack.enter_context(made)
            fill(sessions[form], form, tokens[: args.context])
        for _ in range(args.rounds):
            for form, session in sessions.items():
                for position in range(args.context, room):
                    started = time.perf_counter()
                    session.run_argmax([tokens[position]], [0], [position], [True])
                    times[form].append(time.perf_counter() - started)
        for form, session in sessions.items():
            middle, size = statistics.median(times[form]), session.facts["kv_bytes"] / room
            print(
                f"{form:7} {1e3 * middle:.2f} ms a token, {1 / middle:.2f} tokens/s; {size:.0f} bytes a token"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="kv_figures", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    actions = parser.add_subparsers(required=True)
    first = actions.add_parser("quality")
    first.add_argument("model", type=Path)
    first.add_argument("text", type=Path)
    first.add_argument("--window", type=int, default=1024)
    first.add_argument("--windows", type=int, default=100)
    first.set_defaults(run=quality)
    second = actions.add_parser("speed")
    second.add_argument("model", type=Path)
    second.add_argument("--context", type=int, default=4000)
    second.add_argument("--tokens", type=int, default=4)
    second.add_argument("--rounds", type=int, default=5)
    second.add_argument("--forms", nargs="+", choices=KV_FORMS, default=KV_FORMS)
    second.set_defaults(run=speed)
    for action in (first, second):
        action.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
