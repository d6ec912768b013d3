"""The loss of held-out text and greedy samples, by the trainer's arithmetic and by the native engine's.

`python -m engine.train.evaluate --help` compares the two on the bundled model. Nothing is trained here.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backend import NativeModel
from engine.formats.h1b import read_h1b, unpack_codes
from engine.formats.prepared import prepare
from engine.model import Model as Exported
from engine.model import Ternary
from engine.tokenizer import Tokenizer
from engine.train import data
from engine.train.model import Model, Shape
from engine.train.snapshot import NORMS, matrices

Tokens = NDArray[np.integer]


EVALUATED_AT_ONCE = 32_768  # tokens


@contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """The model as it is exported, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def nats_a_token(model: Model, stream: Tokens, device: str, window: int = 0) -> tuple[float, int]:
    """(nats a token, tokens) over windows of `window` tokens, of the context's length if that is 0.

    They do not overlap, and each starts without what came before.
    """
    places, windows = nats_by_place(model, stream, device, window or model.s.context)
    return float(places.mean()), windows * len(places)


@torch.no_grad()
def nats_by_place(model: Model, stream: Tokens, device: str, window: int) -> tuple[NDArray[np.float64], int]:
    """(mean nats of the token at each place of a window [window], windows), as `nats_a_token` cuts them."""
    tokens = torch.from_numpy(stream.astype(np.int64)).to(device)
    windows = (len(tokens) - 1) // window
    total = torch.zeros(window, dtype=torch.float64)
    at_once = max(1, EVALUATED_AT_ONCE // window)
    with without_dropout(model):
        for start in range(0, windows, at_once):
            rows = range(start, min(start + at_once, windows))
            x = torch.stack([tokens[r * window : r * window + window] for r in rows])
            y = torch.stack([tokens[r * window + 1 : r * window + window + 1] for r in rows])
            total += model(x, y).sum(0).double().cpu()
    return (total / windows).numpy(), windows


@torch.no_grad()
def continuation(model: Model, prompt: list[int], count: int, device: str) -> list[int]:
    """Up to `count` greedy tokens after `prompt`, the special token that ends them among them."""
    ids = list(prompt)
    with without_dropout(model):
        for _ in range(count):
            x = torch.tensor([ids[-256:]], device=device)
            ids.append(int(model.logits(x)[0, -1].argmax()))
            if ids[-1] in (data.BOS, data.EOT):
                break
    return ids[len(prompt) :]


def window_losses_native(model: NativeModel, stream: Tokens, windows: int) -> list[float]:
    """Mean nats a token of each window, by the engine; the protocol is that of `nats_a_token`."""
    context = model.config.max_seq_len
    losses = []
    with model.session() as session:
        for w in range(windows):
            tokens = stream[w * context : w * context + context + 1].astype(np.int64)
            places = range(context)
            logits = session.run(tokens[:-1].tolist(), [0] * context, places, [True] * context)
            losses.append(_cross_entropy(logits, tokens[1:]))
    return losses


def window_losses_trainer(model: Model, stream: Tokens, windows: int) -> list[float]:
    """Mean nats a token of each window, by the trainer's model on the CPU."""
    context = model.s.context
    return [nats_a_token(model, stream[w * context :][: context + 1], "cpu")[0] for w in range(windows)]


def _cross_entropy(logits: NDArray[np.float32], targets: Tokens) -> float:
    """Mean of -log softmax(logits)[target], in float64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float((log_sum - wide[np.arange(len(targets)), targets]).mean())


def rebuild(exported: Exported) -> Model:
    """The trainer's model with the weights of a `.h1b`.

    Of the master weights only their ternary form is left, so they are chosen anew: all that are not zero get
    one magnitude, such that the absmean of the matrix is the exported scale (to float32's rounding).
    """
    c = exported.config
    shape = Shape(
        hidden=c.hidden_size, layers=c.num_layers, heads=c.num_heads, kv_heads=c.num_kv_heads,
        ffn=c.intermediate_size, vocabulary=c.vocab_size, context=c.max_seq_len, theta=c.rope_theta,
        eps=c.rms_norm_eps,
    )  # fmt: skip
    model = Model(shape)
    with torch.no_grad():
        model.embedding.copy_(torch.tensor(exported.embedding))
        model.final_norm.copy_(torch.tensor(exported.final_norm))
        for layer, source in zip(model.layers, exported.layers, strict=True):
            for norm in NORMS:
                getattr(layer, norm).copy_(torch.tensor(getattr(source, norm)))
            for name, weight in matrices(layer).items():
                weight.copy_(torch.from_numpy(_masters(getattr(source, name))))
    return model


def _masters(matrix: Ternary) -> NDArray[np.float32]:
    ternary = unpack_codes(matrix).astype(np.float64) - 1
    return (ternary * float(matrix.scales[0]) / np.abs(ternary).mean()).astype(np.float32)


def held_out_tokens(tokenizer: Tokenizer, data_folder: Path, count: int) -> Tokens:
    """The first `count` tokens of the held-out books, by the engine's tokenizer."""
    stream: list[int] = []
    for book in data.load(data_folder).held_books:
        stream += [data.BOS, *tokenizer.encode(book)]
        if len(stream) >= count:
            break
    return np.array(stream[:count])


def compare(folder: Path, data_folder: Path, library: Path | None, windows: int) -> None:
    """Print the mean loss of the first windows of held-out books, by engine and by the trainer's model."""
    with tempfile.TemporaryDirectory() as scratch:
        h1b, halo = Path(scratch) / "model.h1b", Path(scratch) / "model.halo"
        h1b.write_bytes(lzma.decompress((folder / "model.h1b.xz").read_bytes()))
        exported = read_h1b(h1b)
        context = exported.config.max_seq_len
        tokenizer = Tokenizer.from_htok(folder / "tokenizer.htok")
        tokens = held_out_tokens(tokenizer, data_folder, windows * context + 1)
        windows = (len(tokens) - 1) // context
        print(f"held-out books, {windows} windows of {context} tokens, nats a token", flush=True)
        prepare(exported, halo)
        with NativeModel.open(halo, library) as native:
            engine = _shown("engine", lambda: window_losses_native(native, tokens, windows))
        trainer = _shown("trainer", lambda: window_losses_trainer(rebuild(exported), tokens, windows))
    apart = np.abs(np.subtract(engine, trainer))
    print(f"apart, a window: {apart.mean():.4f} in the mean, {apart.max():.4f} at most")


def _shown(name: str, work: Callable[[], list[float]]) -> list[float]:
    started = time.monotonic()
    losses = work()
    print(f"{name}: {np.mean(losses):.4f} ({time.monotonic() - started:.0f} s)", flush=True)
    return losses


def main() -> None:
    """Compare the engine's and the trainer's loss on held-out books."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("--data", type=Path, required=True, help="the folder of the three text files")
    p.add_argument("--model", type=Path, default=Path("engine/models/demo"))
    p.add_argument("--library", type=Path, help="libhalo_cpu.so; else by HALO_LIB_DIR")
    p.add_argument("--windows", type=int, default=40)
    args = p.parse_args()
    compare(args.model, args.data, args.library, args.windows)


if __name__ == "__main__":
    main()
