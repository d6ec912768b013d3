"""`halo bench --serve` as its user runs it: real servers as children, and what it says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.bench_serve_model import vocabulary
from engine.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SMALL = ["--synthetic", "tiny", "--rounds", "1", "--prompt", "8", "--tokens", "6", "--together", "2"]


def bench(folder: Path, library: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "provision.cli", "bench", "--serve", *SMALL, *more]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HALO_")}
    env |= {"HALO_LIB_DIR": str(library.parent), "XDG_CACHE_HOME": str(folder)}
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def peer(folder: Path, body: str) -> list[str]:
    program = folder / "server"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return ["--peer", f"other={program}", "--peer-model", f"other={program}"]


def test_every_figure_is_there_and_a_peer_s_beside_it(tmp_path, native_library):
    # Another halo stands in for a llama-server: of the arguments only the port is of use to it.
    halo = f"{sys.executable} -m provision.cli serve --listen 127.0.0.1:$6 --slots 2"
    model = tmp_path / "halo" / "bench"
    body = f"cd {ROOT}; HALO_MODEL=$(echo {model}/tiny-*.served) exec {halo}"
    done = bench(tmp_path, native_library, "--json", *peer(tmp_path, body))
    assert done.returncode in (0, 2), done.stderr  # 2: other programs ran meanwhile
    result = json.loads(done.stdout)
    assert set(result["servers"]) == {"halo", "other"}
    for server in result["servers"].values():
        for figure in ("one", "many", "gain", "first", "halo_one_ratio", "halo_many_ratio"):
            assert 0 < server[figure]["least"] <= server[figure]["median"] <= server[figure]["most"]
        assert server["memory"]["rss"] > result["model_bytes"]
    cold = {name: spread["median"] for name, spread in result["cold"].items()}
    assert 0 < cold["health"] <= cold["loaded"] <= cold["token"]
    assert 0 < result["outside_share"]["median"] < 1
    assert result["outside_token"]["median"] > result["scheduler_token"]["median"] > 0


def test_it_is_told_in_sentences(tmp_path, native_library):
    done = bench(tmp_path, native_library, "--markdown")
    assert done.returncode in (0, 2), done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith("- ") for line in lines)
    for word in ("cold start", "outside the native steps", "first token", "at rest"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("body", "said"), [("echo it is broken >&2; exit 1", "it is broken"), ("exit 0", "it said nothing")]
)
def test_a_peer_that_does_not_serve_is_a_sentence(tmp_path, native_library, body, said):
    done = bench(tmp_path, native_library, *peer(tmp_path, body))
    assert done.returncode == 1 and said in done.stderr and "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_synthetic_tokenizer_has_every_id_and_reads_its_own_text():
    made = vocabulary(3000)
    assert len(made.tokens) == len(set(made.tokens)) == 3000
    tokenizer = Tokenizer(made)
    text = "".join(made.tokens[index].decode() for index in (300, 2999, 1500))
    assert b"".join(tokenizer.token_bytes(each) for each in tokenizer.encode(text)).decode() == text
