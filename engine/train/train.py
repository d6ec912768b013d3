"""Train the demo model on one NVIDIA GPU: `python -m engine.train.train --data DIR --out DIR --seconds 1500`.

It can be stopped at any moment and started again: the batch of a step depends on (seed, step) alone, and the whole
state is saved every minute. A compact snapshot (int8 master weights, a few files of under 16 MB) can be carried to
another machine, where only the optimiser's moments are lost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engine.train import data
from engine.train.model import Model, Shape, five_bits
from engine.train.optimiser import Muon

SEED = 1234


def log(out: Path, **row: object) -> None:
    print(json.dumps(row), flush=True)
    with (out / "log.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")


def build_streams(folder: Path, cache: Path, tokenizer_path: Path) -> dict[str, np.ndarray]:
    """Token streams by name, encoded once and kept as .npy files."""
    names = ["books", "stories", "talks", "held_books", "held_stories", "held_talks"]
    if not (cache / "counts.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        corpus, tokenizer = data.load(folder), Tokenizer.from_file(str(tokenizer_path))
        rng = random.Random(SEED)
        talks = [t for _ in range(4) for t in data.dialogue_text(corpus, rng)]
        held_talks = [[pair] for pair in corpus.held_pairs]
        arrays = [data.encode_documents(x, tokenizer) for x in (corpus.books, corpus.stories)]
        arrays.append(data.encode_talks(talks, tokenizer))
        arrays += [data.encode_documents(x, tokenizer) for x in (corpus.held_books, corpus.held_stories)]
        arrays.append(data.encode_talks(held_talks, tokenizer))
        for name, array in zip(names, arrays, strict=True):
            np.save(cache / f"{name}.npy", array)
        characters = {
            "held_books": sum(map(len, corpus.held_books)),
            "held_stories": sum(map(len, corpus.held_stories)),
            "held_talks": sum(len(q) + len(a) for q, a in corpus.held_pairs),
        }
        counts = {"characters": characters, "sha256": corpus.sha256}
        (cache / "counts.json").write_text(json.dumps(counts))
    return {name: np.load(cache / f"{name}.npy") for name in names}


class Batches:
    """Random windows of context + 1 tokens, all streams on the device; a batch is a function of (seed, step)."""

    def __init__(self, streams: dict[str, np.ndarray], rows: int, context: int, device: str) -> None:
        self.streams = [torch.from_numpy(streams[n].astype(np.int32)).to(device) for n in ("books", "stories", "talks")]
        self.rows, self.context, self.device = rows, context, device

    def __call__(self, step: int, shares: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([SEED, step])
        counts = rng.multinomial(self.rows, shares)
        window = torch.arange(self.context + 1, device=self.device)
        rows = []
        for stream, count in zip(self.streams, counts, strict=True):
            starts = torch.from_numpy(rng.integers(0, len(stream) - self.context - 1, count)).to(self.device)
            rows.append(stream[starts[:, None] + window])
        batch = torch.cat(rows).long()
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model: Model, stream: np.ndarray, context: int, device: str, limit: int = 10**9) -> tuple[float, int]:
    """(nats a token, tokens) over windows that do not overlap; each window starts without what came before."""
    tokens = torch.from_numpy(stream.astype(np.int64))[:limit].to(device)
    windows = (len(tokens) - 1) // context
    total = 0.0
    for start in range(0, windows, 32):
        rows = range(start, min(start + 32, windows))
        x = torch.stack([tokens[r * context : r * context + context] for r in rows])
        y = torch.stack([tokens[r * context + 1 : r * context + context + 1] for r in rows])
        total += model(x, y).item() * len(rows)
    return total / windows, windows * context


def factor(progress: float) -> float:
    """Trapezoid: full rate until 35 % of the way, then a straight line to zero."""
    return 1.0 if progress < 0.35 else max(0.0, (1 - progress) / 0.65)


def make_optimisers(model: Model, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if ".weights." in n]
    others = [p for n, p in model.named_parameters() if ".weights." not in n]
    groups = [{"params": others, "decay": 0.0}]
    first: list[torch.optim.Optimizer] = []
    if kind == "muon":
        first = [Muon([{"params": matrices, "decay": 0.1}], lr)]
    else:
        groups.append({"params": matrices, "decay": 0.1})
    fused = next(model.parameters()).is_cuda
    return [*first, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=fused)]


def save(path: Path, model: Model, optimisers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    state = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": step, "steps": steps}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save_compact(folder: Path, model: Model, step: int, steps: int) -> None:
    """Master weights as int8 with a scale a row, in files of under 16 MB, for a start on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    part: dict[str, object] = {"step": step, "steps": steps}
    size, index = 0, 0
    for name, p in model.state_dict().items():
        rows = p.reshape(p.shape[0], -1).float()
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        part[name] = ((rows / scale).round().to(torch.int8).cpu(), scale.cpu()) if p.dim() == 2 else p.cpu()
        size += p.numel()
        if size > 13_000_000:
            torch.save(part, folder / f"compact-{index}.pt")
            part, size, index = {}, 0, index + 1
    torch.save(part, folder / f"compact-{index}.pt")


def load_compact(folder: Path, model: Model) -> tuple[int, int]:
    state: dict[str, object] = {}
    for path in sorted(folder.glob("compact-*.pt")):
        state |= torch.load(path)
    step, steps = int(state.pop("step")), int(state.pop("steps"))  # type: ignore[call-overload]
    tensors = {n: (v[0].float() * v[1] if isinstance(v, tuple) else v) for n, v in state.items()}
    model.load_state_dict(tensors)  # type: ignore[arg-type]
    return step, steps


@torch.no_grad()
def export_weights(folder: Path, model: Model) -> None:
    """What a .h1b needs: int8 ternary matrices with their scale, the embedding as bf16 bits, norms in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {"final_norm": model.final_norm.detach().float().cpu().numpy()}
    for i, layer in enumerate(model.layers):
        for norm in ("input_norm", "post_attn_norm", "attn_sub_norm", "ffn_sub_norm"):
            arrays[f"{i}.{norm}"] = getattr(layer, norm).detach().float().cpu().numpy()
        named = zip(["q", "k", "v", "o", "gate", "up", "down"], [*layer.qkv.weights, *layer.o.weights,
                    *layer.gate_up.weights, *layer.down.weights], strict=True)
        for name, w in named:
            mean = w.float().abs().mean().clamp(min=1e-5)
            codes = (w / mean).round().clamp(-1, 1).to(torch.int8).cpu().numpy()
            digits = np.pad(codes.reshape(-1) + 1, (0, -codes.size % 5)).reshape(-1, 5).astype(np.uint8)
            arrays[f"{i}.{name}"] = (digits @ np.array([1, 3, 9, 27, 81], np.uint8)).astype(np.uint8)
            arrays[f"{i}.{name}.scale"] = mean.cpu().numpy()
    table = five_bits(model.embedding.detach().float()).cpu()
    np.save(folder / "embedding.npy", (table.view(torch.int32) >> 16).to(torch.int16).numpy().view(np.uint16))
    np.savez(folder / "weights.npz", shape=json.dumps(model.s.as_dict()), **arrays)


@torch.no_grad()
def sample(model: Model, tokenizer: Tokenizer, prompt: list[int], count: int, device: str) -> str:
    ids = list(prompt)
    for _ in range(count):
        x = torch.tensor([ids[-256:]], device=device)
        ids.append(int(model.logits(x)[0, -1].argmax()))
        if ids[-1] in (data.BOS, data.EOT):
            break
    return tokenizer.decode(ids[len(prompt) :])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--cache", type=Path, required=True)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--steps", type=int, default=0, help="0: from --seconds and the measured rate")
    p.add_argument("--seconds", type=float, default=1200.0)
    p.add_argument("--rows", type=int, default=64)
    p.add_argument("--lr", type=float, default=2.5e-3)
    p.add_argument("--optimiser", choices=["muon", "adamw"], default="muon")
    p.add_argument("--resume", type=Path, help="a folder with state.pt or compact-*.pt")
    p.add_argument("--shape", type=json.loads, default={})
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    shape = Shape(**args.shape)
    streams = build_streams(args.data, args.cache, args.tokenizer)
    counts = json.loads((args.cache / "counts.json").read_text())
    model = Model(shape).to(args.device)
    optimisers = make_optimisers(model, args.optimiser, args.lr)
    batches = Batches(streams, args.rows, shape.context, args.device)
    step, steps, warm_from = 0, args.steps, 0
    if args.resume and (args.resume / "state.pt").exists():
        state = torch.load(args.resume / "state.pt")
        model.load_state_dict(state["model"])
        for o, s in zip(optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
        step, steps = state["step"], state["steps"]
    elif args.resume and (args.resume / "compact-0.pt").exists():
        step, steps = load_compact(args.resume, model)
        warm_from = step  # the optimiser's moments are gone: warm up once more
    compiled = torch.compile(model) if args.device == "cuda" else model
    log(args.out, event="start", step=step, parameters=sum(q.numel() for q in model.parameters()), shape=shape.as_dict(),
        tokens={k: len(v) for k, v in streams.items()}, args={k: str(v) for k, v in vars(args).items()}, counts=counts,
        torch=torch.__version__, seed=SEED)
    tick, tick_step, saved, first = time.monotonic(), step, time.monotonic(), step
    losses: list[Tensor] = []
    while not steps or step < steps:
        progress = step / steps if steps else 0.0
        rate = factor(progress) * min(1.0, (step - warm_from + 1) / 300)
        for o in optimisers:
            for g in o.param_groups:
                g["lr"] = args.lr * rate
                g["weight_decay"] = g["decay"] if progress < 0.5 else 0.0
        # More questions and answers while the rate falls, when the model keeps what it sees last.
        shares = (0.88, 0.02, 0.10) if progress < 0.35 else (0.84, 0.03, 0.13)
        loss = compiled(*batches(step, shares))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if step == first + 120 and not args.steps and not steps:
            torch.cuda.synchronize()
            tick, tick_step = time.monotonic(), step
        if step == first + 320 and not args.steps and not steps:
            torch.cuda.synchronize()
            rate_s = (time.monotonic() - tick) / (step - tick_step)
            left = args.seconds - (time.monotonic() - started) - 30.0
            steps = step + int(left / rate_s / 1.02)
            log(args.out, event="planned", steps=steps, seconds_a_step=rate_s)
        if step % 100 == 0:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            now = time.monotonic()
            log(args.out, step=step, loss=round(mean, 4), lr=args.lr * rate, norm=round(float(norm), 3),
                tokens_per_s=int(100 * args.rows * shape.context / (now - tick)) if tick_step == step - 100 else None,
                seconds=round(now - started, 1))
            tick, tick_step = now, step
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite")
        if step % 2000 == 0:
            held = {k: round(evaluate(model, streams[k], shape.context, args.device, 400_000)[0], 4)
                    for k in ("held_books", "held_stories", "held_talks")}
            log(args.out, step=step, held_out_first_400k=held)
            tick_step = -1
        if time.monotonic() - saved > 60:
            save(args.out / "state.pt", model, optimisers, step, steps)
            save_compact(args.out / "compact", model, step, steps)
            saved = time.monotonic()
            tick_step = -1
    save(args.out / "state.pt", model, optimisers, step, steps)
    export_weights(args.out / "export", model)
    for k in ("held_books", "held_stories", "held_talks"):
        nats, n = evaluate(model, streams[k], shape.context, args.device)
        bits = nats * len(streams[k]) / math.log(2) / counts["characters"][k]
        log(args.out, event="held-out", stream=k, nats_a_token=round(nats, 4), bits_a_character=round(bits, 4), tokens=n)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    for prompt in ("Once upon a time", "The old man looked at the sea and"):
        ids = [data.BOS, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        log(args.out, prompt=prompt, text=sample(model, tokenizer, ids, 60, args.device))
    for q in ("What does the command tar do?", "How do I list all files, including hidden files?", "Who are you?"):
        ids = [data.BOS, *tokenizer.encode(f"User: {q}", add_special_tokens=False).ids, data.EOT,
               *tokenizer.encode("Assistant:", add_special_tokens=False).ids]
        log(args.out, prompt=q, text=sample(model, tokenizer, ids, 40, args.device))
    log(args.out, event="end", step=step, seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
