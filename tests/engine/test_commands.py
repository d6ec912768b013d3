"""generate, chat and serve as a person and a pipe meet them: what is on stdout, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.dialogue import Dialogue
from engine.errors import HaloError
from engine.sampling import SamplingParams
from tests.engine.server_fixtures import EOT, HashSession, ScriptedSession, byte_tokens, make_engine
from tests.engine.test_locate import make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def env(tmp_path):
    model = make_model(tmp_path / "model")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HALO_")}
    return {**clean, "HALO_MODEL": str(model), "SCRIPT": " Grüße, 🌍!"}


def halo(*args: str, env, stdin: bytes = b"", **kwargs):
    command = [sys.executable, "-m", "tests.engine.commands_main", *args]
    return subprocess.run(command, cwd=ROOT, env=env, input=stdin, capture_output=True, timeout=60, **kwargs)


def spawn(*args: str, env, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine.commands_main", *args], cwd=ROOT, env=env, **kwargs
    )


def test_generate_prints_the_continuation_and_nothing_else(env):
    done = halo("generate", "Once", env=env)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, " Grüße, 🌍!", b"")


@pytest.mark.parametrize("args", [(), ("-",)])
def test_generate_reads_its_prompt_from_stdin(env, args):
    done = halo("generate", *args, "--json", env=env, stdin=b"a\n")
    assert json.loads(done.stdout)["prompt_token_ids"] == [0, 2 + ord("a")]


def test_the_locale_does_not_change_the_bytes(env):
    done = halo(
        "generate", "Once", env={**env, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    )
    assert done.stdout.decode() == " Grüße, 🌍!"


def test_max_tokens_and_stats(env):
    done = halo("generate", "--max-tokens", "3", "--stats", "Once", env=env)
    assert done.stdout == b" Gr" and b"generated 3" in done.stderr


def test_generate_streams_whole_characters_as_they_come(env):
    process = spawn(
        "generate", "x", env={**env, "SCRIPT": "€" * 30, "STEP_SECONDS": "0.02"}, stdout=subprocess.PIPE
    )
    first = os.read(process.stdout.fileno(), 64)
    assert process.poll() is None, "nothing came before the end"
    assert first.decode()
    rest, _ = process.communicate(timeout=60)
    assert (first + rest).decode() == "€" * 30


def test_ctrl_c_ends_with_130_and_no_traceback(env):
    process = spawn(
        "generate", "--max-tokens", "400", "x", env={**env, "SCRIPT": "tick " * 80, "STEP_SECONDS": "0.02"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert os.read(process.stdout.fileno(), 1) == b"t"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors


def test_a_reader_that_leaves_early_is_no_error(env):
    process = spawn(
        "generate", "--max-tokens", "400", "x", env={**env, "SCRIPT": "tick " * 80, "STEP_SECONDS": "0.005"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_prompt_longer_than_the_context_is_a_sentence_and_a_hint(env, command):
    done = halo(command, "-", env={**env, "CONTEXT": "64"}, stdin=b"many words " * 300)
    assert done.returncode == 1 and done.stdout == b""
    assert b"context" in done.stderr and b"hint: " in done.stderr and b"Traceback" not in done.stderr


def test_input_that_is_no_utf8_is_refused(env):
    done = halo("generate", env=env, stdin=b"caf\xe9")
    assert done.returncode == 3 and b"UTF-8" in done.stderr and b"hint: " in done.stderr


@pytest.mark.parametrize(
    "args", [["--max-tokens", "0"], ["--max-tokens", "x"], ["--temperature", "-1"], ["--temperature", "nan"],
             ["--top-p", "2"], ["--top-k", "-1"], ["--seed", "x"]],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_any_work(env, args):
    done = halo("generate", *args, "x", env=env)
    assert done.returncode == 2 and args[0].encode() in done.stderr and done.stdout == b""


def test_top_p_zero_is_refused_too(env):
    assert halo("generate", "--top-p", "0", "x", env=env).returncode == 1


@pytest.mark.parametrize("command", [["generate", "x"], ["chat", "x"], ["serve"]])
def test_no_model_is_a_sentence_and_a_hint(env, command):
    done = halo(*command, env={**env, "HALO_MODEL": "/nonexistent"})
    assert done.returncode in (1, 3) and b"no model" in done.stderr and b"hint: " in done.stderr


def test_chat_answers_an_argument_or_a_pipe_with_the_answer_alone(env):
    for done in (halo("chat", "How?", env=env), halo("chat", env=env, stdin=b"How?\n")):
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "Grüße, 🌍!", b"")


def test_chat_refuses_an_empty_message(env):
    assert b"empty" in halo("chat", env=env, stdin=b" \n").stderr


class Terminal:
    """A chat on a pseudo-terminal; what was read and not yet asked for is kept."""

    def __init__(self, env) -> None:
        self.fd, slave = pty.openpty()
        try:
            files = {"stdin": slave, "stdout": slave, "stderr": slave}
            self.process = spawn("chat", env={**env, "TERM": "dumb"}, **files)
        finally:
            os.close(slave)
        self._seen = b""

    def say(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def expect(self, wanted: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while wanted.encode() not in self._seen:
            assert time.monotonic() < end, (wanted, self._seen)
            if select.select([self.fd], [], [], 0.2)[0]:
                self._seen += os.read(self.fd, 4096)
        self._seen = self._seen.split(wanted.encode(), 1)[1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(env):
    opened: list[Terminal] = []

    def start(**change: str) -> Terminal:
        opened.append(Terminal({**env, **change}))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_chat_on_a_terminal_is_a_dialogue(terminal):
    chat = terminal()
    chat.expect("> ")
    for line in ("hello", "again"):
        chat.say(line)
        chat.expect("Grüße, 🌍!")
        chat.expect("> ")
    chat.say("/reset")
    chat.expect("> ")
    chat.say("/exit")
    assert chat.process.wait(60) == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_dialogue(terminal):
    chat = terminal(SCRIPT=" tick" * 80, STEP_SECONDS="0.02")
    chat.expect("> ")
    chat.say("hello")
    chat.expect("tick")
    chat.process.send_signal(signal.SIGINT)
    chat.expect("> ")
    chat.say("/exit")
    assert chat.process.wait(60) == 0


def test_ctrl_c_at_the_prompt_ends_with_130(terminal):
    chat = terminal()
    chat.expect("> ")
    chat.process.send_signal(signal.SIGINT)
    # A signal that comes just before readline waits is seen by Python when the line ends: press Enter.
    chat.say("")
    assert chat.process.wait(60) == 130


# --- the dialogue's memory


def ask(dialogue: Dialogue, message: str) -> tuple[str, list[str]]:
    notes: list[str] = []
    return "".join(step.text for step in dialogue.ask(message, notes.append)), notes


def test_the_dialogue_keeps_its_turns_and_resets():
    dialogue = Dialogue(
        make_engine(ScriptedSession([*byte_tokens(b" ok"), EOT])), SamplingParams(), system="Be."
    )
    ask(dialogue, "one")
    ask(dialogue, "two")
    assert [(m.role, m.content) for m in dialogue.turns] == [
        ("user", "one"), ("assistant", " ok"), ("user", "two"), ("assistant", " ok")
    ]  # fmt: skip
    dialogue.reset()
    assert dialogue.turns == []


def test_a_second_turn_runs_only_what_is_new():
    session = HashSession()
    dialogue = Dialogue(make_engine(session), SamplingParams(max_tokens=1))
    ask(dialogue, "a question of some length, to be read once " * 3)
    first = session.prefilled
    ask(dialogue, "b")
    assert session.prefilled - first < 40 < first


def test_the_oldest_turns_go_when_the_context_is_full_and_it_says_so():
    engine = make_engine(ScriptedSession([*byte_tokens(b" ok"), EOT]), context=128)
    dialogue = Dialogue(engine, SamplingParams(max_tokens=20), system="Stay")
    notes = []
    for number in range(12):
        answer, note = ask(dialogue, f"question number {number}")
        notes += note
        assert answer == " ok"
    assert notes and "dropped" in notes[0]
    assert dialogue.turns[0].role == "user" and dialogue.turns[-2].content == "question number 11"
    assert len(dialogue.turns) < 24


def test_a_message_that_never_fits_leaves_the_history_as_it_was():
    engine = make_engine(ScriptedSession([*byte_tokens(b" ok"), EOT]), context=64)
    dialogue = Dialogue(engine, SamplingParams(max_tokens=8))
    ask(dialogue, "one")
    before = list(dialogue.turns)
    with pytest.raises(HaloError, match="context"):
        ask(dialogue, "far too long " * 50)
    assert dialogue.turns == before
    assert ask(dialogue, "two")[0] == " ok"


def test_an_answer_that_was_broken_off_stays_as_far_as_it_got():
    dialogue = Dialogue(make_engine(ScriptedSession(byte_tokens(b"abcdef"))), SamplingParams(max_tokens=6))
    steps = dialogue.ask("x", print)
    assert next(steps).text + next(steps).text == "ab"
    steps.close()
    assert dialogue.turns[-1].content == "ab"


# --- the cost of --help, and the server's refusals


def test_reading_the_arguments_imports_nothing_heavy():
    code = (
        "import argparse, sys, engine.commands as c\n"
        "for n in ('generate', 'chat', 'serve'): getattr(c, 'configure_' + n)(argparse.ArgumentParser())\n"
        "heavy = ('numpy', 'starlette', 'uvicorn', 'msgspec', 'tiktoken', 'asyncio')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--listen", "nonsense"], b"ADDRESS:PORT"),
        (["--host", "0.0.0.0", "--port", "0"], b"API keys"),
        (["--listen", "0.0.0.0:0"], b"API keys"),
        (["--api-keys", "/nonexistent"], b"API keys"),
        (["--listen", "127.0.0.1:0", "--port", "1"], b"--listen"),
    ],
)
def test_serve_refuses_with_a_sentence_and_a_hint(env, args, words):
    done = halo("serve", *args, env=env)
    assert done.returncode in (1, 3) and words in done.stderr and b"hint: " in done.stderr
    assert b"Traceback" not in done.stderr
