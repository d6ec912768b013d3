"""halo ppl: the figure is the oracle's on the same windows, each token counts once, refusals are clear."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backend import NativeModel
from engine.errors import HaloError
from engine.formats.seal import seal
from engine.ppl import LOGITS_BYTES, Protocol, Scores, characters, plan, positions_at_once, score, surprisal
from engine.reference import Reference
from tests.engine.server_fixtures import VOCABULARY, HashSession
from tests.engine.test_native_serving import write_model

ROOT = Path(__file__).parents[2]
CONTEXT = 64
BOS = 0
TEXT = "The engine turns tokens into tokens; naïve 🌍 text.\r\n\n  It is read as it is.\n" * 3


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """(model directory, its oracle); the 300 tokens are 2 specials, 256 bytes and 42 merges."""
    model = tiny_model("plain", seed=11, max_seq_len=CONTEXT)
    folder = write_model(tmp_path_factory.mktemp("tiny") / "model", model, merges=42)
    describe(folder, context=CONTEXT)
    return folder, Reference(model)


@pytest.fixture
def env(tiny, native_library):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HALO_")}
    return {**clean, "HALO_MODEL": str(tiny[0]), "HALO_LIB_DIR": str(native_library.parent)}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def describe(folder: Path, context: int) -> None:
    """Write the trained context into model.json."""
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, "context": context}))
    seal(folder)


def halo_ppl(*args: object, env, stdin: bytes = b""):
    command = [sys.executable, "-m", "provision.cli", "ppl", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, timeout=120)


def measured(*args: object, env, stdin: bytes = b"") -> dict:
    done = halo_ppl("--json", *args, env=env, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return json.loads(done.stdout)


class OracleSession:
    """The oracle behind the session's interface."""

    def __init__(self, oracle: Reference) -> None:
        self.oracle, self.cache = oracle, oracle.new_cache()

    def run(self, tokens, slots, positions, want):
        self.cache.length = positions[0]
        return self.oracle.forward(tokens, self.cache)[np.array(want, bool)]

    def close(self) -> None:
        pass


class Recorder:
    """Hands out the rows of another session, and keeps what was asked."""

    def __init__(self, session) -> None:
        self.session, self.fed, self.rows = session, [], []
        self.most = 0

    def run(self, tokens, slots, positions, want):
        if positions[0] == 0:
            self.fed.append([])
        self.fed[-1] += tokens
        self.most = max(self.most, len(tokens))
        self.rows.append(self.session.run(tokens, slots, positions, want))
        return self.rows[-1]

    def close(self) -> None:
        pass


class FixedSession:
    """The same logits everywhere."""

    def __init__(self, logits: Sequence[float]) -> None:
        self.logits = np.array(logits, np.float32)

    def run(self, tokens, slots, positions, want):
        return np.tile(self.logits, (sum(want), 1))

    def close(self) -> None:
        pass


def textbook(oracle: Reference, tokens: list[int], protocol: Protocol) -> list[float]:
    """The nats of every token by the protocol as docs/engine.md words it, one whole window at a time."""
    nats: dict[int, float] = {}
    for start in range(0, len(tokens), protocol.stride):
        end = min(start + protocol.window, len(tokens))
        before = [protocol.bos] if protocol.bos is not None else tokens[:start][-1:]
        fed = before + tokens[start : end - 1]
        if fed:
            wide = oracle.forward(fed, oracle.new_cache()).astype(np.longdouble)
            for row, place in zip(wide[::-1], range(end - 1, -1, -1), strict=False):
                log_sum = row.max() + np.log(np.exp(row - row.max()).sum())
                nats.setdefault(place, float(log_sum - row[tokens[place]]))
        if end == len(tokens):
            break
    return [nats[place] for place in sorted(nats)]


# --- the figure


@pytest.mark.parametrize("bos", [BOS, None], ids=["bos", "no-bos"])
@pytest.mark.parametrize(("window", "stride"), [(64, 64), (32, 32), (40, 13), (7, 1), (1, 1)])
def test_logits_and_figure_are_the_oracles_on_the_same_windows(tiny, native_library, window, stride, bos):
    """Logits by ==. A figure that others are to believe must not depend on who computed it."""
    folder, oracle = tiny
    tokens = np.random.default_rng(window).integers(2, 300, 83).tolist()
    protocol = Protocol(window, stride, bos)
    theirs = Recorder(OracleSession(oracle))
    with NativeModel.open(folder / "model.halo", native_library) as model, model.session() as session:
        ours = Recorder(session)
        found = score(ours, tokens, protocol, 17)
    expected = score(theirs, tokens, protocol, CONTEXT)
    assert np.array_equal(np.concatenate(ours.rows), np.concatenate(theirs.rows))
    assert found == expected
    words = textbook(oracle, tokens, protocol)
    assert len(words) == found.tokens
    assert math.fsum(words) == pytest.approx(math.fsum(found.nats), rel=1e-12)


def test_the_figure_is_the_same_on_every_path_and_any_threads(tiny, native_library, cpu_paths):
    """A figure from one box is to be had again on another, to the last digit."""
    tokens = np.random.default_rng(1).integers(2, 300, 100).tolist()
    with NativeModel.open(tiny[0] / "model.halo", native_library) as model:
        found = set()
        for path in cpu_paths:
            for threads in (1, 3):
                with model.session(threads=threads, path=path) as session:
                    found.add(score(session, tokens, Protocol(48, 20, BOS), 31))
    assert len(found) == 1


def test_the_command_prints_the_oracles_figure(tiny, env, text_file):
    from engine.tokenizer import Tokenizer

    folder, oracle = tiny
    tokens = Tokenizer.from_htok(folder / "tokenizer.htok").encode(TEXT)
    report = measured(text_file, "--window", "48", "--stride", "30", env=env)
    words = textbook(oracle, tokens, Protocol(48, 30, BOS))
    assert report["perplexity"] == pytest.approx(math.exp(sum(words) / len(tokens)), rel=1e-9)
    assert report["bits_per_character"] == pytest.approx(sum(words) / math.log(2) / len(TEXT), rel=1e-9)
    assert (report["tokens_scored"], report["characters_scored"]) == (len(tokens), len(TEXT))


def test_a_case_by_hand():
    """Probabilities 1/2, 1/4, 1/4 for every token, with and without the first token scored."""
    session = FixedSession([math.log(2), 0, 0])
    tokens = [0, 1, 0, 2, 2]  # 1, 2, 1, 2, 2 bits
    with_bos = score(session, tokens, Protocol(2, 2, 1), 8)
    assert with_bos.counts == (2, 2, 1)
    assert [n / math.log(2) for n in with_bos.nats] == pytest.approx([3, 3, 2], rel=1e-7)
    assert with_bos.perplexity == pytest.approx(2**1.6, rel=1e-7)
    assert with_bos.bits_per_character(4) == pytest.approx(2, rel=1e-7)
    # Mean 1.6 bits; off it by -0.2, -0.2, 0.4 a window: sqrt(3 / 2 * 0.24) / 5 bits.
    assert with_bos.standard_error == pytest.approx(0.12 * math.log(2), rel=1e-6)
    without = score(session, tokens, Protocol(2, 2, None), 8)
    assert without.counts == (1, 2, 1)
    assert math.fsum(without.nats) / math.log(2) == pytest.approx(7, rel=1e-7)


def test_what_is_fed_is_the_protocols():
    """BOS, then the window's tokens but the last; without BOS the token before the window."""
    for bos, fed in (
        (9, [[9, 1, 2], [9, 4, 5], [9]]),
        (None, [[1, 2], [3, 4, 5], [6]]),
    ):
        recorder = Recorder(FixedSession([0.0] * 10))
        score(recorder, [1, 2, 3, 4, 5, 6, 7], Protocol(3, 3, bos), 8)
        assert recorder.fed == fed


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_token_is_scored_exactly_once(data):
    """A token counted twice or left out at a window's edge bends the figure without anyone seeing it."""
    window = data.draw(st.integers(1, 40))
    stride = data.draw(st.integers(1, window))
    bos = data.draw(st.sampled_from([BOS, None]))
    count = data.draw(st.integers(1 if bos is not None else 2, 200))
    windows = plan(count, Protocol(window, stride, bos))
    scored = [place for w in windows for place in range(w.first, w.end)]
    assert scored == list(range(0 if bos is not None else 1, count))
    for w in windows:
        assert w.start <= w.first < w.end <= w.start + window and w.start % stride == 0
    assert [w.end for w in windows].index(count) == len(windows) - 1


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunking_does_not_change_the_figure(data):
    """HashSession's logits depend on every token before; a wrong position or KV entry would show."""
    window = data.draw(st.integers(1, 24))
    protocol = Protocol(window, data.draw(st.integers(1, window)), data.draw(st.sampled_from([BOS, None])))
    tokens = data.draw(st.lists(st.integers(0, 29), min_size=2, max_size=60))
    recorder, at_once = Recorder(HashSession(vocab=30)), data.draw(st.integers(1, 30))
    assert score(recorder, tokens, protocol, at_once) == score(HashSession(vocab=30), tokens, protocol, 1000)
    assert recorder.most <= at_once


def test_the_logits_of_one_request_are_bounded():
    for vocabulary in (3, 8192, 128256, 1 << 24):
        assert 1 <= positions_at_once(vocabulary) <= max(1, LOGITS_BYTES // (4 * vocabulary))


def test_log_softmax_neither_overflows_nor_rounds_in_float32():
    assert surprisal(np.array([3e38, -3e38], np.float32), 0) == 0
    assert surprisal(np.array([1e4, 1e4], np.float32), 1) == pytest.approx(math.log(2), rel=1e-15)
    assert surprisal(np.array([0, -20], np.float32), 0) == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_characters_are_counted_where_they_begin(tiny):
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_htok(tiny[0] / "tokenizer.htok")
    assert characters(tokenizer, tokenizer.encode(TEXT)) == len(TEXT)
    earth = tokenizer.encode("🌍")
    assert len(earth) == 4, "the little vocabulary has no token for it"
    assert [characters(tokenizer, [token]) for token in earth] == [1, 0, 0, 0]


def test_progress_ends_at_the_number_of_tokens():
    seen = []
    score(FixedSession([0.0] * 3), [1] * 20, Protocol(8, 4, None), 3, lambda *pair: seen.append(pair))
    assert seen[-1] == (19, 19) and [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- what it says of a model that cannot be right


def test_uniform_means_within_one_percent():
    def at(perplexity: float) -> Scores:
        return Scores((math.log(perplexity),), (1,))

    assert at(1000).is_uniform(1000) and at(991).is_uniform(1000) and at(1009).is_uniform(1000)
    assert not at(989).is_uniform(1000) and not at(1011).is_uniform(1000)


def test_a_model_of_zeros_is_called_damaged(tiny_model, tmp_path, env, text_file):
    """Its perplexity is a number like any other; a person must be told that it means nothing was read."""
    model = tiny_model("plain", max_seq_len=CONTEXT)
    blank = replace(model, embedding=np.zeros_like(model.embedding))
    folder = write_model(tmp_path / "model", blank, merges=42)
    done = halo_ppl(text_file, "--model", folder, "--json", env=env)
    report = json.loads(done.stdout)
    assert done.returncode == 2 and b"weights are damaged" in done.stderr
    assert report["perplexity"] == pytest.approx(300, rel=1e-12) and "damaged" in report["warnings"][0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(HaloError, match="not finite"):
        score(FixedSession([0.0, bad]), [0, 1], Protocol(4, 4, BOS), 8)


def test_a_perplexity_beyond_float64_is_null_in_json():
    from engine.ppl_command import _figures

    scores = score(FixedSession([0.0, 3e4]), [0, 0], Protocol(4, 4, BOS), 8)
    assert scores.perplexity == math.inf
    assert _figures(scores, 2)["perplexity"] is None


# --- the command


def test_json_has_the_whole_protocol(env, text_file, tiny):
    report = measured(text_file, "--window", 20, "--stride", 10, "--no-bos", "--tokens", 50, "--threads", 1,
                      env=env)  # fmt: skip
    assert report["schema"] == 1
    assert report["protocol"] == {"window": 20, "stride": 10, "bos": None, "max_tokens": 50}
    assert report["model"] == {"name": "tiny", "context": CONTEXT, "vocabulary": 300}
    assert report["text"] == {
        "name": str(text_file),
        "bytes": len(TEXT.encode()),
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }
    assert (report["tokens_scored"], report["windows"], report["warnings"]) == (49, 4, [])
    assert report["engine"]["threads"] == 1 and report["seconds"] >= 0
    assert report["perplexity"] == pytest.approx(math.exp(report["nats_per_token"]))
    assert report["perplexity_error"] == pytest.approx(report["perplexity"] * report["nats_per_token_error"])


def test_the_defaults_are_the_context_no_overlap_and_bos(env, text_file):
    report = measured(text_file, env=env)
    assert report["protocol"] == {"window": CONTEXT, "stride": CONTEXT, "bos": BOS, "max_tokens": None}


@pytest.mark.parametrize("args", [(), ("-",)])
def test_stdin_is_the_same_text(env, text_file, args):
    """Also its last newline, which generate would take off."""
    from_stdin, from_file = (
        measured(*args, env=env, stdin=TEXT.encode()),
        measured(text_file, env=env),
    )
    for report in (from_stdin, from_file):
        del report["seconds"]
    assert from_stdin["text"].pop("name") == "-" and from_file["text"].pop("name") == str(text_file)
    assert from_stdin == from_file


def test_what_looks_like_a_special_token_is_text(env):
    report = measured(env=env, stdin=b"<|endoftext|>")
    assert report["characters_scored"] == 13 and report["tokens_scored"] > 1


def test_a_person_reads_the_figures_and_the_protocol(env, text_file):
    done = halo_ppl(text_file, "--window", 32, env=env)
    assert done.returncode == 0 and done.stderr == b"", "a pipe gets no progress"
    for words in (b"perplexity  ", b" +- ", b"32 tokens, stride 32, each after BOS (0)", b"tokens/s"):
        assert words in done.stdout
    one = halo_ppl("--no-bos", env=env, stdin=b"short")
    assert b"no standard error" in one.stdout and b"without BOS" in one.stdout


def test_a_terminal_sees_progress_on_stderr(env, text_file):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "provision.cli", "ppl", str(text_file)]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=theirs, timeout=120)
    os.close(theirs)
    seen = os.read(ours, 65536)
    os.close(ours)
    assert done.returncode == 0 and b" tokens" in seen and seen.endswith(b"\r\033[K")
    assert done.stdout.startswith(b"perplexity")


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        ((), b"", b"too short: it has no tokens"),
        (("--no-bos",), b"a", b"too short: it has 1 token, and at least 2"),
        ((), b"abc\xff", b"not UTF-8 (byte 3)"),
        (("--window", "65"), b"abc", b"65 tokens does not fit the model's context of 64"),
        (("--window", "0"), b"abc", b"does not fit"),
        (("--window", "8", "--stride", "9"), b"abc", b"stride of 9 is not between 1 and the window of 8"),
        (("--stride", "0"), b"abc", b"stride of 0"),
        (("--window", "x"), b"abc", b"invalid int value"),
        (("--tokens", "0"), b"abc", b"--tokens is 0"),
        (("--threads", "99999999999"), b"abc", b"--threads is 99999999999"),
        (("/nonexistent/text",), b"", b"cannot be read: No such file"),
        (("/",), b"", b"cannot be read: Is a directory"),
        (("--model", "/nonexistent"), b"abc", b"There is no model"),
    ],
)
def test_refusals_are_a_sentence_and_a_hint(env, args, stdin, words):
    done = halo_ppl(*args, env=env, stdin=stdin)
    assert done.returncode in (1, 3) and done.stdout == b""
    assert words in done.stderr and b"hint: " in done.stderr and b"Traceback" not in done.stderr


def test_a_tokenizer_of_another_model_is_refused(tiny_model, tmp_path, env):
    """Else every id would be another word, and the figure merely bad."""
    assert len(VOCABULARY.tokens) != 300
    folder = write_model(tmp_path / "model", tiny_model("plain", max_seq_len=CONTEXT), merges=41)
    done = halo_ppl("--model", folder, env=env, stdin=b"abc")
    assert done.returncode == 1 and b"300 tokens and its tokenizer 299" in done.stderr


def test_reading_the_arguments_imports_nothing_heavy():
    code = (
        "import argparse, sys, engine.ppl_command as c\n"
        "c.configure_ppl(argparse.ArgumentParser())\n"
        "print([m for m in ('numpy', 'tiktoken') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert done.stdout.strip() == b"[]"
