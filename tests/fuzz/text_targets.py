"""Fuzz targets of files that are text: descriptions, seals, tokenizers, templates, what an install has."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import install
from checks.collect import read_installed
from checks.facts import parse
from engine import template_sandbox
from engine.chat_template import ChatTemplate
from engine.errors import HaloError
from engine.formats.hf_config import FAMILIES, HfConfig
from engine.formats.seal import check_open, problems, read_seal
from engine.formats.store import read_description, store_name, unpack
from engine.formats.tokenizer_files import tokenizer_files
from engine.locate import locate, read_card
from engine.model import ModelConfig
from engine.server.keys import key_is_known, read_keys
from engine.tokenizer import TextTokenizer, load_tokenizer
from engine.tokenizer_facts import TokenizerFacts, read_facts
from engine.tokenizer_library import SentencePieceTokenizer
from provision.desired import client_address, load_desired
from provision.distro import pretty_name
from provision.generations import is_sound, read_manifest
from provision.journal import read_journal
from tests.fuzz import text_seeds
from tests.fuzz.target import Finding, Target, unpack_files, write_files

TEXT = " the other\n0123 <|eot_id|> <s> \u00e9\u4e2d \U0001f642  x"
VOCAB = 272  # of the models that the tokenizers' inputs are for


def each(*calls: Callable[[], object]) -> None:
    """All of the calls; the last refusal is raised, after each was seen to have a hint."""
    refusal: HaloError | None = None
    for call in calls:
        try:
            call()
        except HaloError as error:
            if not error.hint:
                raise Finding(f"a refusal without a hint: {error.message[:80]}") from error
            refusal = error
    if refusal is not None:
        raise refusal


def run_model_json(data: bytes, folder: Path) -> None:
    """Every reader of model.json, and that its texts can be printed."""
    (folder / "model.json").write_bytes(data)
    each(
        lambda: read_card(folder).name.encode(),
        lambda: store_name(read_description(folder)).encode(),
        lambda: read_facts(folder / "model.json"),
    )


SEALED = ("SHA256SUMS", "model.json", "model.halo", "tokenizer.htok", "chat_template.jinja")


def run_seal(data: bytes, folder: Path) -> None:
    """A model directory with a seal, whose last line is made to fit where the seal begins with `+`."""
    text = write_files(data, folder, SEALED).get("SHA256SUMS", b"")
    if text.startswith(b"+"):
        body = text[1:].rpartition(b"# of the lines above: ")[0]
        last = f"# of the lines above: {hashlib.sha256(body).hexdigest()}\n"
        (folder / "SHA256SUMS").write_bytes(body + last.encode())
    each(lambda: read_seal(folder), lambda: check_open(folder), lambda: list(problems(folder)))


STORED = ("model.json", "model.h1b", "model.h1b.xz", "SHA256SUMS", "NOTICE")


def run_store(data: bytes, folder: Path) -> None:
    """A model's directory as a bundle has it, unpacked into a store."""
    source, store = folder / "source", folder / "store"
    source.mkdir(exist_ok=True)
    shutil.rmtree(store, ignore_errors=True)
    write_files(data, source, STORED)
    try:
        unpack(source, store)
    except HaloError:
        assert not store.exists() or not any(store.iterdir()), "something half-written stayed in the store"
        raise


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def model_config(bos: int | None) -> HfConfig:
    """The model that the tokenizers' inputs are for; bos and eos are the same id, or unsaid."""
    shape = ModelConfig(8, 8, 1, 2, 1, VOCAB, 16, True, 1e4, 1e-5)
    return HfConfig(shape, "none", False, bos, bos, FAMILIES["LlamaForCausalLM"])


def run_tokenizer_json(data: bytes, folder: Path) -> None:
    """The tokenizer of a checkpoint as an import takes it; then what it wrote, opened and used."""
    files = write_files(data, folder, TOKENIZER)
    bos = 261 if b"bos_token" not in files.get("tokenizer_config.json", b"") else None
    taken = tokenizer_files(folder, model_config(bos))
    _use(taken.tokenizer)
    made = folder / "made"
    made.mkdir(exist_ok=True)
    for path in made.iterdir():
        path.unlink()
    taken.write(made)
    (made / "model.json").write_text(json.dumps({"tokenizer": taken.facts.to_json()}))
    again = load_tokenizer(made)
    if again.encode(TEXT) != taken.tokenizer.encode(TEXT):
        raise Finding("the tokenizer that was written encodes otherwise")


def _use(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(0 <= index < tokenizer.size for index in ids)
    tokenizer.decode(ids)
    tokenizer.fewest_tokens(TEXT)


def run_tokenizer_model(data: bytes, folder: Path) -> None:
    """A SentencePiece model through its library."""
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    _use(SentencePieceTokenizer(path, TokenizerFacts(VOCAB, 1, 2, (1,), (2,))))


MESSAGES = (
    {"role": "system", "content": "Be <|eot_id|> brief."}, {"role": "user", "content": " Hi \n"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "ls?"},
)  # fmt: skip
SPECIAL = {"<|eot_id|>": 5, "<s>": 1, "</s>": 2, "<|im_start|>": 6, "<|im_end|>": 7}


def run_template(data: bytes, _folder: Path) -> None:
    """A template, compiled and rendered, under limits a tenth and less of the real ones."""
    limits = {"MAX_STEPS": 10_000, "MAX_TEXT": 1 << 18, "MAX_SECONDS": 1.0}
    before = {name: getattr(template_sandbox, name) for name in limits}
    try:
        vars(template_sandbox).update(limits)
        template = ChatTemplate(data.decode("utf-8", "replace"), SPECIAL, {"bos_token": "<s>"})
        each(lambda: template.render(MESSAGES), lambda: template.render(MESSAGES[1:2], answer=False))
    finally:
        vars(template_sandbox).update(before)


def run_halo_toml(data: bytes, folder: Path) -> None:
    """The owner's declaration, and the address in it."""
    path = folder / "halo.toml"
    path.write_bytes(data)
    desired = load_desired(path)
    client_address(desired.listen)
    (folder / "again.toml").write_text(desired.text())
    if load_desired(folder / "again.toml") != desired:
        raise Finding("halo.toml does not come back as it was written")


INSTALLED = ("manifest.json", "model.json", "halo.toml")


def run_generation(data: bytes, folder: Path) -> None:
    """A generation's manifest, by everyone who reads it: the doctor, the installer, the engine."""
    generation, store = folder / "generations" / "g", folder / "store"
    if not generation.exists():
        (generation / "models").mkdir(parents=True)
        store.mkdir()
        (folder / "current").symlink_to("generations/g")
        (generation / "models" / "default").symlink_to("../../../store")
    files = unpack_files(data, INSTALLED)
    for name, place in (("manifest.json", generation), ("model.json", store), ("halo.toml", folder)):
        (place / name).write_bytes(files.get(name, b""))
    read_installed(folder, unit_dir=folder / "units")
    read_manifest(generation)
    is_sound(generation)
    (store / "model.halo").touch()
    (store / "tokenizer.htok").touch()
    home = locate(environ={"HALO_GENERATION_DIR": str(generation)})
    f"{home.generation} {home.version}".encode()


def run_journal(data: bytes, folder: Path) -> None:
    """The records of a run."""
    path = folder / "run.jsonl"
    path.write_bytes(data)
    assert all(isinstance(entry, dict) for entry in read_journal(path))


def run_os_release(data: bytes, _folder: Path) -> None:
    """os-release, for a sentence."""
    assert isinstance(pretty_name(data.decode("utf-8", "replace")), str)


def run_facts(data: bytes, _folder: Path) -> None:
    """gather.sh's stream, with everything that is read out of it."""
    parse(data)


def run_keys(data: bytes, folder: Path) -> None:
    """The file of the API keys' hashes."""
    path = folder / "keys"
    path.write_bytes(data)
    assert not key_is_known("nobody's", read_keys(path))


def run_bundle(data: bytes, folder: Path) -> None:
    """A bundle, unpacked: nothing may come to lie beside the directory."""
    place = folder / "place"
    shutil.rmtree(folder, ignore_errors=True)
    place.mkdir(parents=True)
    (folder / "bundle.tar").write_bytes(_summed(data))
    try:
        install.unpack(str(folder / "bundle.tar"), str(place))
    except OSError as error:
        raise install.Refusal(str(error), "main() makes a sentence of it") from error
    finally:
        if sorted(path.name for path in folder.iterdir()) != ["bundle.tar", "place"]:
            raise Finding("a bundle wrote outside of its directory")


def _summed(data: bytes) -> bytes:
    """A tar with the checksum of each header made anew."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def _optional() -> Iterator[Target]:
    for module, name in (("tokenizers", "tokenizer_json"), ("sentencepiece", "tokenizer_model")):
        if importlib.util.find_spec(module) or name == "tokenizer_json":
            yield replace(TOKENIZER_TARGETS[name], name=name)


_JSON = (
    b"null", b"true", b"false", b"[]", b"{}", b"-1", b"0", b"1e400", b"NaN", b"9223372036854775808", b'"x"',
    b"\\ud800", b"\\u0000", b"[[[[[[[[[[[[[[[[", b'{"a":{"a":{"a":{"a":',
)  # fmt: skip
_JINJA = (
    b"{% for m in messages %}", b"{% endfor %}", b"{{", b"}}", b"{% if ", b"%}", b"{% else %}",
    b"{% endif %}", b"{% set ", b"{% macro f(x) %}", b"{% endmacro %}", b"{% break %}", b"{% generation %}",
    b"|join(", b"|replace(", b"|tojson", b"|indent", b"|trim", b"namespace(", b"loop.index", b"range(9999)",
    b"~", b"**", b"messages[0]", b"['content']", b"add_generation_prompt", b"raise_exception('",
    b"strftime_now(", b".__class__", b"|attr(", b"%s", b"*99999999", b"|groupby(", b"|sort", b"|unique",
    b"|map(", b"cycler(", b"joiner(", b"|batch(", b".format(", b"|truncate(", b"|wordcount", b"<|im_start|>",
    b"<|", b"|>", b"<s>", b"{% call ", b"{% filter ", b"{% block b %}",
    b"{% include ", b"{% import ", b"{% extends ",
    b"{% raw %}",
)  # fmt: skip
TOKENIZER_TARGETS = {
    "tokenizer_json": Target(
        "tokenizer_json", run_tokenizer_json, text_seeds.tokenizer_json, words=(*_JSON, *text_seeds.WORDS)
    ),
    "tokenizer_model": Target("tokenizer_model", run_tokenizer_model, text_seeds.tokenizer_model),
}
TARGETS = [
    Target("model_json", run_model_json, text_seeds.model_json, words=_JSON),
    Target("seal", run_seal, text_seeds.seal),
    Target("store", run_store, text_seeds.store, words=_JSON),
    *_optional(),
    Target("template", run_template, text_seeds.template, words=_JINJA, seconds=10.0),
    Target(
        "halo_toml",
        run_halo_toml,
        text_seeds.halo_toml,
        words=(b"[[", b'"""', b"'''", b"\\u", b"0x", b"[::1]"),
    ),
    Target("generation", run_generation, text_seeds.generation, words=_JSON),
    Target("journal", run_journal, text_seeds.journal, words=_JSON),
    Target("os_release", run_os_release, text_seeds.os_release),
    Target("facts", run_facts, text_seeds.facts),
    Target("keys", run_keys, text_seeds.keys),
    Target("bundle", run_bundle, text_seeds.bundle, refusals=(install.Refusal,)),
]
