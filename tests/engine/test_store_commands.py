"""`halo model pull`, `list` and `verify` as a person runs them: what they print, and how they end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.chat import stop_ids
from engine.formats.seal import PREPARED, SEAL, seal
from engine.inventory import known_models, parameters, verify
from engine.model import Model
from provision.cli import main
from tests.engine.hub_server import REPO, Hub, cut
from tests.engine.test_hf import ONLINE, Truth, checkpoint
from tests.engine.test_native_serving import CONTEXT, write_model


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    """Neither this machine's installation nor its token take part."""
    for name in ("HALO_GENERATION_DIR", "HALO_MODEL", "HF_TOKEN", "HF_ENDPOINT", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small BitNet checkpoint, as transformers writes them."""
    made = checkpoint(tmp_path_factory.mktemp("published") / "m", Truth().masters(), ONLINE)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    return {**files, "README.md": b"a model", "pytorch_model.bin": b"pickle"}


@pytest.fixture
def hub(published) -> Iterator[Hub]:
    made = Hub(published)
    yield made
    made.close()


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    made = write_model(tmp_path / "models" / "tiny", tiny_model("plain", seed=3, max_seq_len=CONTEXT), 42)
    describe(made)
    return made


def describe(directory: Path) -> None:
    """Give model.json the files that it must list, and seal."""
    import hashlib

    described = json.loads((directory / "model.json").read_text())
    described["files"] = {
        name: {
            "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest(),
            "bytes": (directory / name).stat().st_size,
        }
        for name in (PREPARED, "tokenizer.htok")
    }
    (directory / "model.json").write_text(json.dumps(described))
    seal(directory)


def test_a_pull_ends_in_a_model_that_decodes(hub, native_library, capsys):
    from engine.generate import Engine
    from engine.sampling import SamplingParams

    hub.faults["model.safetensors"] = [cut(50_000)]
    assert main(["model", "pull", f"{REPO}@main", "made", "--endpoint", hub.url, "--name", "mine"]) == 0
    said = capsys.readouterr()
    assert "next: halo chat --model made" in said.out and "broke off after 50,000" in said.err
    described = json.loads(Path("made/model.json").read_text())
    assert described["name"] == "mine"
    assert json.loads(Path("made/pull.json").read_text())["repo"] == REPO
    with Engine.open(Path("made"), native_library) as engine:
        golden = described["golden"][0]
        params = SamplingParams(max_tokens=len(golden["ids"]), temperature=0.0)
        ids = engine.complete(golden["prompt_ids"], params).token_ids
        assert ids == golden["ids"] and stop_ids(engine.tokenizer)
    assert [path.name for path in Path.cwd().iterdir()] == ["made"], (
        "what was fetched is gone after the import"
    )
    assert main(["model", "verify", "made"]) == 0
    assert main(["model", "pull", REPO, "made", "--endpoint", hub.url]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_pull_without_import_leaves_the_published_files(hub, published, capsys):
    arguments = ["model", "pull", REPO, "--no-import", "--json", "--endpoint", hub.url]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["directory"] == "tiny" and told["imported"] is False and len(told["commit"]) == 40
    assert {name: (Path("tiny") / name).read_bytes() for name in told["files"]} == {
        name: data for name, data in published.items() if name != "pytorch_model.bin"
    }
    assert main(arguments) == 0, "run again, it finds everything there"


def test_what_was_fetched_is_kept_when_the_pull_fails_and_found_again(hub, capsys):
    hub.faults["model.safetensors"] = [lambda answer, _: answer.reply(404, b"")]
    arguments = ["model", "pull", REPO, "made", "--endpoint", hub.url]
    assert main(arguments) == 1
    assert ".made.pull; the same command goes on" in capsys.readouterr().err and not Path("made").exists()
    hub.seen.clear()
    assert main(arguments) == 0
    assert not hub.requests("config.json") and Path("made/model.halo").is_file()


def heeding() -> None:
    """A test run in a script's background ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_what_came_and_says_how_to_go_on(hub, published):
    def half(answer, body):
        answer.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        answer.wfile.write(body[: len(body) // 2])
        time.sleep(60)

    hub.faults["model.safetensors"] = [half]
    words = [sys.executable, "-m", "provision.cli", "model", "pull", REPO, "made", "--endpoint", hub.url]
    words.append("--no-import")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    part = Path("made/model.safetensors.part")
    with subprocess.Popen(
        words, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heeding
    ) as pull:
        until = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        pull.send_signal(signal.SIGINT)
        said = pull.communicate(timeout=60)[1]
    assert pull.returncode == 130, said
    assert "kept in made; the same command goes on" in said and "Traceback" not in said
    assert not part.with_name("model.safetensors").exists()
    assert main(words[3:]) == 0
    assert part.with_name("model.safetensors").read_bytes() == published["model.safetensors"]
    began = [headers.get("Range", "") for path, headers in hub.seen if path.endswith("model.safetensors")]
    assert began[-1].startswith("bytes=") and int(began[-1][6:-1]) <= len(published["model.safetensors"]) // 2


def test_a_model_that_halo_cannot_run_is_refused_before_its_weights(hub, published, capsys):
    config = json.loads(published["config.json"]) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
    }
    hub.commits["1" * 40]["config.json"] = json.dumps(config).encode()
    assert main(["model", "pull", REPO, "made", "--endpoint", hub.url]) == 1
    assert capsys.readouterr().err.count("error: ") == 1 and not hub.requests("model.safetensors")
    hub.commits["1" * 40] |= {"config.json": published["config.json"], "tokenizer.json": b"{}"}
    assert main(["model", "pull", REPO, "other", "--endpoint", hub.url]) == 1
    assert "tokenizer" in capsys.readouterr().err and not hub.requests("model.safetensors")


def test_wrong_words_are_sentences(hub, capsys):
    assert main(["model", "pull", "no repository", "--endpoint", hub.url]) == 3
    assert main(["model", "pull", REPO, "--endpoint", "http://hub.example"]) == 1
    assert main(["model", "pull", REPO, "--token-file", "gone", "--endpoint", hub.url]) == 1
    assert main(["model", "verify", "gone"]) == 3
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 4 and errors.count("hint: ") == 4 and "Traceback" not in errors


def test_the_list_says_what_there_is(model, capsys, tiny_model):
    assert main(["model", "list", str(model.parent)]) == 0
    name, family, weights, size, context, users, where = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (name, family, context, users, where) == ("tiny", "bitnet", str(CONTEXT), "", str(model))
    assert weights.endswith("k") and size.endswith("B")
    assert main(["model", "list", "--json", str(model)]) == 0
    (told,) = json.loads(capsys.readouterr().out)["models"]
    assert told["path"] == str(model) and told["problem"] == ""
    assert told["parameters"] == count(tiny_model("plain", max_seq_len=CONTEXT))
    assert main(["model", "list"]) == 0
    assert "No models here" in capsys.readouterr().err


def test_a_name_of_anyones_making_does_not_move_the_cursor(model, capsys):
    described = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**described, "name": "\x1b[2Jgone\t\n"}))
    assert main(["model", "list", str(model)]) == 0
    assert capsys.readouterr().out.startswith("?[2Jgone??\t")


def count(model: Model) -> int:
    """By hand, from the arrays."""
    total = model.embedding.size + model.final_norm.size
    for layer in model.layers:
        for part in vars(layer).values():
            total += part.size if isinstance(part, np.ndarray) else part.rows * part.cols
    return total


def test_parameters_are_those_of_the_arrays(tiny_model):
    for shape in ("plain", "odd", "wide", "least"):
        made = tiny_model(shape)
        assert parameters(made.config) == count(made)


def test_the_list_names_generations_and_damaged_models(model, tmp_path):
    prefix, store = tmp_path / "halo", tmp_path / "state" / "models"
    stored = store / "sha256-abc"
    shutil.copytree(model, stored)
    shutil.copytree(model, store / "sha256-bad")
    (store / "sha256-bad" / PREPARED).write_bytes(b"no")
    for generation in ("0.1.0-old", "0.1.0-new"):
        (prefix / "generations" / generation / "models").mkdir(parents=True)
        (prefix / "generations" / generation / "models" / "tiny").symlink_to(stored)
        (prefix / "generations" / generation / "models" / "default").symlink_to("tiny")
    shutil.copytree(model, "pulled")
    environ = {"HALO_GENERATION_DIR": str(prefix / "generations" / "0.1.0-new"), "HALO_MODEL": str(model)}
    found = {known.path: known for known in known_models([], environ)}
    assert found.keys() == {stored, store / "sha256-bad", Path("pulled").resolve(), model}
    assert found[stored].used_by == ["0.1.0-new", "0.1.0-old"] and not found[model].used_by
    assert "no prepared model" in found[store / "sha256-bad"].problem


def test_verify_names_the_file_the_tensor_and_the_cure(model, capsys):
    assert main(["model", "verify", str(model)]) == 0
    assert capsys.readouterr().out.split() == [
        "whole", SEAL, "whole", PREPARED, "whole", "model.json", "whole", "tokenizer.htok"
    ]  # fmt: skip
    data = bytearray((model / PREPARED).read_bytes())
    data[-4096] ^= 4  # the first byte of the last tensor: each begins a page
    (model / PREPARED).write_bytes(data)
    assert main(["model", "verify", str(model)]) == 1
    said = capsys.readouterr()
    assert f"damaged  {PREPARED}" in said.out and "The tensor embedding" in said.out
    assert "halo model import" in said.err
    (model / "pull.json").write_text(json.dumps({"repo": REPO, "commit": "1" * 40}))
    assert main(["model", "verify", "--json", str(model)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [found["file"] for found in told["problems"]] == [PREPARED]
    assert told["cure"].startswith(f"fetch it again: halo model pull {REPO}@{'1' * 40}")


@pytest.mark.parametrize("name", [SEAL, "model.json", "tokenizer.htok", PREPARED])
def test_verify_sees_each_file_cut_and_gone(model, name, capsys):
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[:-1])
    assert main(["model", "verify", str(model)]) == 1
    assert f"damaged  {name}: " in capsys.readouterr().out
    (model / name).unlink()
    assert main(["model", "verify", str(model)]) == 1
    said = capsys.readouterr().out
    assert f"damaged  {name}: " in said and said.count("damaged  ") == 1


@pytest.mark.parametrize("name", [SEAL, "model.json", "tokenizer.htok", PREPARED])
def test_verify_sees_any_byte(model, name):
    path = model / name
    whole = path.read_bytes()
    rng = random.Random(name)
    for at in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        assert [found for found, _ in verify(model).problems if found == name], at


def test_a_change_on_purpose_is_sealed_and_damage_is_not(model, capsys):
    described = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**described, "context": 32}))
    assert main(["model", "verify", str(model)]) == 1
    assert main(["model", "verify", "--seal", str(model)]) == 0
    assert main(["model", "verify", str(model)]) == 0
    (model / "tokenizer.htok").write_bytes((model / "tokenizer.htok").read_bytes()[:-1])
    capsys.readouterr()
    assert main(["model", "verify", "--seal", str(model)]) == 1
    assert main(["model", "verify", str(model)]) == 1
    assert "damaged  tokenizer.htok" in capsys.readouterr().out


def test_a_tokenizer_of_another_size_is_named(model, tiny_model, capsys):
    other = write_model(model.parent / "other", tiny_model("plain", max_seq_len=CONTEXT), 41)
    shutil.copyfile(other / "tokenizer.htok", model / "tokenizer.htok")
    describe(model)
    assert main(["model", "verify", str(model)]) == 1
    assert "has 299 tokens, and the model 300" in capsys.readouterr().out
