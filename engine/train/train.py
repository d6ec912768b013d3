"""Train the demo model on one NVIDIA GPU: `python -m engine.train.train --help`. The rest of halo needs none.

It can be stopped at any moment and started again: the batch of a step depends on (seed, step) alone, and the
whole state is saved every minute. docs/demo-model.md has the commands and what came of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.train import data
from engine.train.evaluate import continuation, nats_a_token, nats_by_place
from engine.train.model import Model
from engine.train.optimiser import make_optimisers
from engine.train.recipe import RECIPES, Recipe
from engine.train.snapshot import export_weights, load_compact, load_state, save_compact, save_state
from engine.train.streams import HELD_OUT, SEED, TRAINING, Batches, Streams, build_streams

WARM_UP = 300  # steps
FLAT_UNTIL = 0.35  # of the way
PLAN_FROM, PLAN_AT = 120, 320  # steps between which the rate is measured; the first ones compile
LOG_EVERY, EVALUATE_EVERY = 100, 2000  # steps
SAVE_EVERY = 60.0  # seconds
PROMPTS = ("Once upon a time", "The old man looked at the sea and")
QUESTIONS = (
    "What does the command tar do?",
    "How do I list all files, including hidden files?",
    "Who are you?",
)


@dataclass(frozen=True)
class Options:
    """The command line. `steps` 0 means: as many as fit into `seconds` at the measured rate."""

    data: Path
    out: Path
    cache: Path
    tokenizer: Path
    steps: int = 0
    seconds: float = 1200.0
    tokens: int = 65_536
    lr: float = 2.5e-3
    optimiser: str = "muon"
    recipe: str = "record"
    resume: Path | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    device: str = "cuda"


def factor(progress: float) -> float:
    """The learning rate's: full until 35 % of the way, then a straight line to zero."""
    return 1.0 if progress < FLAT_UNTIL else max(0.0, (1 - progress) / (1 - FLAT_UNTIL))


def log(out: Path, **row: object) -> None:
    """Print a row, and append it to log.jsonl."""
    print(json.dumps(row), flush=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def wait_for_device() -> None:
    """Until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """Where the current stretch of steps began: seconds of the monotonic clock, and the step.

    Step -1: something else than training was done in it, so it says nothing about the rate.
    """

    seconds: float
    step: int


@dataclass
class Trainer:
    """A run: what it trains, how far it is, and what it does at each step."""

    options: Options
    recipe: Recipe
    streams: Streams
    counts: dict[str, Any]
    model: Model
    optimisers: list[torch.optim.Optimizer]
    batches: Batches
    started: float
    loss_of: Callable[[Tensor, Tensor], Tensor]
    step: int = 0
    steps: int = 0
    warm_from: int = 0
    rate: float = 0.0
    norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    losses: list[Tensor] = field(default_factory=list)
    by_stream: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: Clock(time.monotonic(), -1))
    plan_clock: Clock = field(default_factory=lambda: Clock(time.monotonic(), -1))

    @classmethod
    def start(cls, options: Options) -> Trainer:
        """A run at its first step, or where `options.resume` left off."""
        started = time.monotonic()
        torch.manual_seed(SEED)
        torch.set_float32_matmul_precision("high")
        recipe = RECIPES[options.recipe]
        recipe = replace(recipe, shape=replace(recipe.shape, **options.shape))
        streams, counts = build_streams(options.data, options.cache, options.tokenizer, recipe)
        model = Model(recipe.shape, recipe.dropout).to(options.device)
        optimisers = make_optimisers(model, options.optimiser, options.lr)
        batches = Batches(streams, options.tokens, options.device, recipe)
        loss_of = torch.compile(model, dynamic=False) if options.device == "cuda" else model
        trainer = cls(options, recipe, streams, counts, model, optimisers, batches, started, loss_of)
        trainer.resume()
        return trainer

    def resume(self) -> None:
        """Take up state.pt, or else a compact snapshot, of the folder `options.resume`, if it has one."""
        folder = self.options.resume
        if folder and (folder / "state.pt").exists():
            self.step, self.steps = load_state(folder / "state.pt", self.model, self.optimisers)
        elif folder and (folder / "compact-0.pt").exists():
            self.step, self.steps = load_compact(folder, self.model)
            self.warm_from = self.step  # the optimiser's moments are gone: warm up once more
        self.steps = self.steps or self.options.steps

    def run(self) -> None:
        """Train to the last step; log, evaluate and save on the way."""
        first = self.step
        self.clock = Clock(time.monotonic(), self.step)
        saved = time.monotonic()
        while not self.steps or self.step < self.steps:
            self.train_step()
            if not self.steps:
                self.plan(self.step - first)
            if self.step % LOG_EVERY == 0:
                self.log_progress()
            if self.step % EVALUATE_EVERY == 0:
                self.log_held_out_in_short()
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()

    def train_step(self) -> None:
        """One batch forward and back, one step of the optimisers."""
        progress = self.step / self.steps if self.steps else 0.0
        self.rate = factor(progress) * min(1.0, (self.step - self.warm_from + 1) / WARM_UP)
        for group in (g for o in self.optimisers for g in o.param_groups):
            group["lr"] = self.options.lr * self.rate
            group["weight_decay"] = group["decay"] if progress < self.recipe.decay_until else 0.0
        loss = self.backward(min(self.recipe.window(progress), self.model.s.context), progress)
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self.step += 1

    def backward(self, window: int, progress: float) -> Tensor:
        """The loss of this step's batch, whose gradient is added to what the parameters hold."""
        if self.recipe.dropout:
            torch.manual_seed(SEED + self.step)  # a run that was stopped drops the same
        x, y, counts = self.batches(self.step, window, self.recipe.shares_at(progress))
        rows = self.loss_of(x, y).mean(1)
        rows.mean().backward()
        self.by_stream.append((torch.stack([part.sum() for part in rows.detach().split(counts)]), counts))
        return rows.detach().mean()

    def plan(self, done: int) -> None:
        """Measure the rate between two steps, and set how many steps fit into `options.seconds`."""
        if done == PLAN_FROM:
            wait_for_device()
            self.plan_clock = Clock(time.monotonic(), self.step)
            self.clock = Clock(time.monotonic(), self.step)
        if done == PLAN_AT:
            wait_for_device()
            now = time.monotonic()
            seconds_a_step = (now - self.plan_clock.seconds) / (self.step - self.plan_clock.step)
            seconds = self.mean_seconds_a_step(seconds_a_step)
            left = self.options.seconds - (time.monotonic() - self.started) - 30.0
            self.steps = self.step + int(left / seconds / 1.02)
            log(self.options.out, event="planned", steps=self.steps, seconds_a_step=seconds)
            self.clock.step = -1

    def mean_seconds_a_step(self, now: float) -> float:
        """Seconds a step over the whole run, if a step takes `now` seconds at the first length of window.

        It times a step at each other length, once it is compiled; their gradients are thrown away.
        """
        starts = [start for start, _ in self.recipe.windows]
        parts = [end - start for start, end in zip(starts, [*starts[1:], 1.0], strict=True)]
        total = parts[0] * now
        for part, (start, window) in zip(parts[1:], self.recipe.windows[1:], strict=True):
            for _ in range(3):
                wait_for_device()
                began = time.monotonic()
                self.backward(window, start)
                wait_for_device()
                seconds = time.monotonic() - began
                self.by_stream.pop()
            for optimiser in self.optimisers:
                optimiser.zero_grad(set_to_none=True)
            total += part * seconds
        return total

    def log_start(self) -> None:
        """What is trained, on what, and how."""
        log(
            self.options.out,
            event="start",
            step=self.step,
            parameters=sum(p.numel() for p in self.model.parameters()),
            shape=self.model.s.as_dict(),
            tokens={name: len(stream) for name, stream in self.streams.items()},
            args={name: str(value) for name, value in vars(self.options).items()},
            counts=self.counts,
            torch=torch.__version__,
            seed=SEED,
        )

    def log_progress(self) -> None:
        """The mean loss since the last row, the rate, the speed. Ends the run if the loss is not finite."""
        mean = float(torch.stack(self.losses).mean())
        sums = torch.stack([sums for sums, _ in self.by_stream]).sum(0).tolist()
        rows = [sum(counts) for counts in zip(*(c for _, c in self.by_stream), strict=True)]
        self.losses.clear()
        self.by_stream.clear()
        now = time.monotonic()
        tokens = LOG_EVERY * self.options.tokens
        whole = self.clock.step == self.step - LOG_EVERY
        log(
            self.options.out,
            step=self.step,
            loss=round(mean, 4),
            by_stream={n: round(s / r, 4) for n, s, r in zip(TRAINING, sums, rows, strict=True) if r},
            lr=self.options.lr * self.rate,
            norm=round(float(self.norm), 3),
            tokens_per_s=int(tokens / (now - self.clock.seconds)) if whole else None,
            seconds=round(now - self.started, 1),
        )
        self.clock = Clock(now, self.step)
        if not math.isfinite(mean):
            raise SystemExit("the loss is not finite")

    def log_held_out_in_short(self) -> None:
        """The held-out loss of the first 400,000 tokens of each stream."""
        held = {name: round(self.held_out(name, 400_000)[0], 4) for name in HELD_OUT}
        log(self.options.out, step=self.step, held_out_first_400k=held)
        self.clock.step = -1

    def held_out(self, name: str, limit: int | None = None) -> tuple[float, int]:
        """(nats a token, tokens) of a held-out stream, at the first length of window."""
        window = min(self.recipe.windows[0][1], self.model.s.context)
        return nats_a_token(self.model, self.streams[name][:limit], self.options.device, window)

    def save(self) -> None:
        """Leave the whole state, and a compact snapshot, in `options.out`."""
        save_state(self.options.out / "state.pt", self.model, self.optimisers, self.step, self.steps)
        save_compact(self.options.out / "compact", self.model, self.step, self.steps)
        self.clock.step = -1

    def finish(self) -> None:
        """Save and export; log the held-out loss, and samples."""
        out = self.options.out
        save_state(out / "state.pt", self.model, self.optimisers, self.step, self.steps)
        export_weights(out / "export", self.model)
        for name in HELD_OUT:
            nats, tokens = self.held_out(name)
            bits = nats * len(self.streams[name]) / math.log(2) / self.counts["characters"][name]
            figures = {"nats_a_token": round(nats, 4), "bits_a_character": round(bits, 4), "tokens": tokens}
            log(out, event="held-out", stream=name, **figures)
        self.log_places()
        self.log_samples()
        log(out, event="end", step=self.step, seconds=round(time.monotonic() - self.started, 1))

    def log_places(self) -> None:
        """What a long context is good for: the loss of the held-out books by place in the longest window."""
        context = self.model.s.context
        places, _ = nats_by_place(self.model, self.streams["held_books"], self.options.device, context)
        edges = [0, *(e for e in (128, 256, 512, 1024, 2048, 3072) if e < context), context]
        nats = {end: round(float(places[start:end].mean()), 4) for start, end in pairwise(edges)}
        log(self.options.out, event="by-place", window=context, nats_up_to=nats)

    def log_samples(self) -> None:
        """Greedy continuations of two openings, and answers to three questions."""
        tokenizer = Tokenizer.from_file(str(self.options.tokenizer))

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        prompts = [(text, [data.BOS, *encode(text)], 60) for text in PROMPTS]
        for text in QUESTIONS:
            ids = [data.BOS, *encode(f"User: {text}"), data.EOT, *encode("Assistant:")]
            prompts.append((text, ids, 40))
        for text, ids, count in prompts:
            answer = continuation(self.model, ids, count, self.options.device)
            log(self.options.out, prompt=text, text=tokenizer.decode(answer))


def parse_arguments() -> Options:
    """The options of the command line; their defaults stand in `Options`."""
    p = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    p.add_argument("--data", type=Path, required=True, help="the folder of the three text files")
    p.add_argument("--out", type=Path, required=True, help="for state.pt, compact/, export/ and log.jsonl")
    p.add_argument("--cache", type=Path, required=True, help="for the encoded token streams")
    p.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json of engine.train.data")
    p.add_argument("--steps", type=int, help="0: from --seconds and the measured rate")
    p.add_argument("--seconds", type=float, help="of the whole run")
    p.add_argument("--recipe", choices=sorted(RECIPES), help="record: the bundled model's")
    p.add_argument("--tokens", type=int, help="a step")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--optimiser", choices=["muon", "adamw"])
    p.add_argument("--resume", type=Path, help="a folder with state.pt or compact-*.pt")
    p.add_argument("--shape", type=json.loads, help="fields of engine.train.model.Shape, as JSON")
    p.add_argument("--device", help="cuda, or cpu for a trial of a few steps")
    return Options(**vars(p.parse_args()))


def main() -> None:
    """Train, export, measure."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer.start(options)
    trainer.log_start()
    trainer.run()
    trainer.finish()


if __name__ == "__main__":
    main()
