"""From a model directory to an HTTP answer with nothing in the place of anything: the native engine serves.

The oracle (engine/reference.py) says what the tokens must be, for a small random model and for the demo.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import openai
import pytest

from engine.chat import Message, render, stop_ids
from engine.errors import HaloError
from engine.formats.h1b import read_h1b
from engine.formats.htok import Vocabulary, write_htok
from engine.formats.prepared import prepare
from engine.formats.store import seal, unpack
from engine.generate import Engine
from engine.model import Model
from engine.reference import Reference
from engine.sampling import SamplingParams
from engine.tokenizer import Tokenizer
from tests.engine.server_fixtures import free_port, train_vocabulary, wait_until

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "engine" / "models" / "demo"
PROMPTS = ["Once upon a time", "x", "The engine", "The engine, the model and the server " * 3, "Ünïcödé 🌍"]
CONTEXT = 256


def write_model(path: Path, model: Model, merges: int, template: str = "halo-demo") -> Path:
    """A model directory as the store has it."""
    path.mkdir(parents=True)
    ours = train_vocabulary(merges)
    write_htok(
        path / "tokenizer.htok", Vocabulary(ours.tokens, ours.merges, ours.bos, ours.eos, ours.special)
    )
    prepare(model, path / "model.halo")
    card = {"schema": 1, "name": "tiny", "chat_template": template, "context": CONTEXT}
    (path / "model.json").write_text(json.dumps(card))
    seal(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """(model directory, its oracle); 300 tokens are 2 specials, 256 bytes and 42 merges."""
    model = tiny_model("plain", seed=5, max_seq_len=CONTEXT)
    return write_model(tmp_path_factory.mktemp("tiny") / "model", model, merges=42), Reference(model)


def until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    """The oracle does not stop by itself: its ids up to the first end token."""
    for at, token in enumerate(ids):
        if token in ends:
            return ids[: at + 1]
    return ids


def test_greedy_tokens_are_the_oracles_whatever_ran_before(tiny, native_library):
    directory, oracle = tiny
    with Engine.open(directory, native_library) as engine:
        ends = stop_ids(engine.tokenizer)
        for prompt in [*PROMPTS, *reversed(PROMPTS)]:
            ids = engine.encode_prompt(prompt)
            got = engine.complete(ids, SamplingParams(max_tokens=24)).token_ids
            assert got == until_end(oracle.greedy(ids, 24), ends)


def test_the_context_may_be_made_shorter_but_not_longer(tiny, native_library):
    directory, _ = tiny
    with Engine.open(directory, native_library, context=40) as engine:
        done = engine.complete(engine.encode_prompt("Once"), SamplingParams(temperature=1.0, seed=1))
        assert engine.context == 40 and done.finish_reason in ("stop", "length")
    with Engine.open(directory, native_library, context=10**6) as engine:
        assert engine.context == CONTEXT


def test_a_tokenizer_of_another_model_is_refused(tiny_model, native_library, tmp_path):
    directory = write_model(tmp_path / "m", tiny_model("plain", max_seq_len=CONTEXT), merges=41)
    with pytest.raises(HaloError, match="300 tokens and its tokenizer 299"):
        Engine.open(directory, native_library)


@pytest.mark.parametrize("name", ["model.halo", "tokenizer.htok", "model.json"])
def test_a_truncated_file_is_one_clear_error(tiny, native_library, tmp_path, name):
    directory, _ = tiny
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((directory / name).read_bytes()[:-7])
    with pytest.raises(HaloError) as info:
        Engine.open(tmp_path, native_library)
    assert info.value.message and info.value.hint


@contextlib.contextmanager
def served(directory: Path, library: Path, *args: str):
    """`halo serve` as a process; gives its URL, and expects a clean end on SIGTERM."""
    port = free_port()
    env = {**os.environ, "HALO_MODEL": str(directory), "HALO_LIB_DIR": str(library.parent)}
    env.pop("HALO_GENERATION_DIR", None)
    command = [sys.executable, "-m", "tests.engine.commands_main", "serve", "--port", str(port), *args]
    log = tempfile.TemporaryFile()  # noqa: SIM115 (no pipe: nobody reads it, and a full one stops the server)
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (log.seek(0), log.read())
        with contextlib.suppress(httpx.TransportError):
            health = httpx.get(f"{url}/health")
            return health.status_code == 200 and not health.json()["loading"]
        return False

    try:
        wait_until(answers, 60)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        log.close()


def test_the_served_tokens_are_the_oracles(tiny, native_library):
    directory, oracle = tiny
    with Engine.open(directory, native_library) as engine:
        tokenizer = engine.tokenizer
    ends = stop_ids(tokenizer)
    with served(directory, native_library, "--threads", "2") as url:
        health = httpx.get(f"{url}/health").json()
        assert health["status"] == "ok" and health["backend"] == "cpu" and health["threads"] == 2
        assert health["model"] == "tiny" and health["isa"] and health["generation"] == "source"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        extra = {"extra_body": {"return_token_ids": True}}
        for prompt in PROMPTS:
            done = client.completions.create(model="tiny", prompt=prompt, temperature=0, **extra)
            wanted = until_end(oracle.greedy([tokenizer.bos, *tokenizer.encode(prompt)], 16), ends)
            assert done.choices[0].token_ids == wanted
            assert done.choices[0].text == tokenizer.decode(wanted)
            messages = [{"role": "user", "content": prompt}]
            chat = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=16, temperature=0, **extra
            )
            ids = render([Message("user", prompt)], tokenizer, "halo-demo")
            assert chat.choices[0].token_ids == until_end(oracle.greedy(ids, 16), ends)
            assert chat.usage.prompt_tokens == len(ids)


def test_a_reader_who_leaves_does_not_hold_up_the_native_engine(tiny, native_library):
    directory, _ = tiny
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "temperature": 1.0, "stream": True}
    with served(directory, native_library) as url:
        for _ in range(20):
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as stream:
                next(stream.iter_lines())
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 0)


def test_no_library_is_a_sentence_and_a_hint(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HALO_LIB_DIR", str(tmp_path))
    with pytest.raises(HaloError) as info:
        Engine.open(tiny[0])
    assert "libhalo_cpu.so" in info.value.message and info.value.hint


# --- the demo model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = unpack(DEMO, tmp_path_factory.mktemp("store"))
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    seal(directory)
    return directory


def test_the_demo_model_decodes_its_golden_tokens_over_http(demo, native_library):
    """As the doctor and the installer ask: by text (a prompt or a question) and by token ids."""
    golden = json.loads((demo / "model.json").read_text())["golden"]
    tokenizer = Tokenizer.from_htok(demo / "tokenizer.htok")
    assert golden
    with served(demo, native_library) as url:
        for each in golden:
            if each["prompt_ids"] == [tokenizer.bos, *tokenizer.encode(each["prompt"])]:
                path, by_text = "completions", {"prompt": each["prompt"]}
            else:
                path, by_text = (
                    "chat/completions",
                    {"messages": [{"role": "user", "content": each["prompt"]}]},
                )
            for where, asked in ((path, by_text), ("completions", {"prompt": each["prompt_ids"]})):
                body = {"temperature": 0, "max_tokens": len(each["ids"]), "return_token_ids": True, **asked}
                answer = httpx.post(f"{url}/v1/{where}", json=body, timeout=120).json()
                assert answer["choices"][0]["token_ids"] == each["ids"], each["prompt"]


def test_the_demo_model_answers_a_question_and_ends_its_turn(demo, native_library):
    with Engine.open(demo, native_library) as engine:
        ids = render([Message("user", "How do I list files?")], engine.tokenizer, engine.card.chat_template)
        done = engine.complete(ids, SamplingParams(max_tokens=200), strip_leading=True)
    assert done.finish_reason == "stop" and done.text.strip() and "<|" not in done.text
    assert done.text == done.text.lstrip()


def test_the_demo_tokenizer_gives_any_text_back(demo):
    tokenizer = Tokenizer.from_htok(demo / "tokenizer.htok")
    text = (ROOT / "docs" / "architecture.md").read_text(
        "utf-8"
    ) + "Don't\t\n\n  12345 naïve 汉字 🌍 <|eot_id|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not any(tokenizer.is_special(i) for i in ids)
