"""Make a model directory of whatever a model comes as: model.halo, tokenizer, model.json, seal. No downloads.

The layers go straight from the source into the prepared file, one at a time; see `engine.formats.sources`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engine.atomic import fsync_directory, replacing
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.formats.sources import Source, open_source
from engine.formats.store import PREPARED, read_description, seal
from engine.model import Layer, Model, ModelConfig, ModelStream

if TYPE_CHECKING:
    from engine.formats.gguf_model import Activation
    from engine.formats.tokenizer_files import TokenizerFiles

ORACLE_PARAMETERS: Final = 100_000_000
GOLDEN_PROMPT: Final = "Once upon a time"
GOLDEN_TOKENS: Final = 32
# Called with (what is done, how far, of how much).
Progress = Callable[[str, int, int], None]


@dataclass
class ImportReport:
    """What an import did: the directory, its model.json, and sentences that the person should read."""

    directory: Path
    description: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def import_model(
    source: Path,
    destination: Path,
    name: str | None = None,
    *,
    tokenizer: Path | None = None,
    activation: Activation | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ImportReport:
    """Make the model directory `destination` of the checkpoint folder, .gguf or .h1b file `source`.

    The directory appears whole or not at all. `tokenizer` and `activation` win over what the source says.
    Raises HaloError where the source is damaged, is of a model that the engine does not run, or the directory
    exists or cannot be written.
    """
    source, destination = Path(source), Path(destination)
    name = _name(source, name)
    if destination.exists():
        raise HaloError(f"{destination} exists already.", hint="name a directory that does not exist")
    opened = open_source(source, tokenizer, activation)
    staging = destination.parent / f".{destination.name}.{os.getpid()}.tmp"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        report = _write(staging, opened, name, progress)
        seal(staging)
        staging.rename(destination)
        fsync_directory(destination.parent)
    except OSError as error:
        raise HaloError(
            f"The model cannot be written to {destination}: {error.strerror}.",
            hint=f"df -h {destination.parent}",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report.directory = destination
    return report


def prepare_directory(
    directory: Path,
    *,
    activation: Activation | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Make model.halo of a model directory anew, and seal it; returns its path.

    It is made from the .h1b or .gguf file that lies there, else from the model.halo itself. Raises HaloError
    where the directory is none, or what it is made from is damaged.
    """
    directory = Path(directory)
    description = read_description(directory)
    models = sorted(each for each in directory.iterdir() if each.suffix in (".h1b", ".gguf"))
    if len(models) > 1:
        raise HaloError(f"{directory} holds several model files.", hint="leave one of them there")
    opened = open_source(models[0] if models else directory, None, activation)
    prepared = directory / PREPARED
    try:
        prepare(watched(opened.stream, progress), prepared)
        if PREPARED in description["files"]:
            description["files"][PREPARED] = _facts(prepared)
            with replacing(directory / "model.json") as file:
                file.write(_json(description))
        seal(directory)
    except OSError as error:
        raise HaloError(
            f"{prepared} cannot be written: {error.strerror}.", hint=f"df -h {directory}"
        ) from error
    return prepared


def _name(source: Path, name: str | None) -> str:
    found = source.resolve()
    name = name or (found.name if found.is_dir() else found.stem).lstrip(".") or "model"
    if "/" in name or not name.isprintable() or name.startswith("."):
        raise HaloError(f"{name!r} cannot be a model's name.", hint="use letters, digits, dots and dashes")
    return name


def _write(staging: Path, opened: Source, name: str, progress: Progress) -> ImportReport:
    tokenizer = opened.tokenizer()  # first, since it may be refused, and the weights take long
    prepare(watched(opened.stream, progress), staging / PREPARED)
    files = [PREPARED, *tokenizer.write(staging)]
    golden, notes = _golden(opened.stream, tokenizer)
    description = {
        "schema": 1,
        "name": name,
        "files": {file: _facts(staging / file) for file in files},
        "chat_template": tokenizer.chat_template,
        "tokenizer": tokenizer.facts.to_json(),
        "context": opened.stream.config.max_seq_len,
        "golden": golden,
        "licence": "see the model's own",
        "source": {"format": opened.format, "files": _hashes(opened.files | tokenizer.read, progress)},
    }
    notes = [*opened.notes(), *notes, *tokenizer.notes]
    (staging / "model.json").write_bytes(_json(description))
    return ImportReport(staging, description, notes)


def _json(description: dict[str, Any]) -> bytes:
    return (json.dumps(description, indent=1) + "\n").encode()


def watched(stream: ModelStream, progress: Progress) -> ModelStream:
    """The stream, saying each layer that was taken from it."""

    def layers() -> Iterator[Layer]:
        for index, layer in enumerate(stream.layers()):
            progress("layers", index, stream.config.num_layers)
            yield layer
        progress("layers", stream.config.num_layers, stream.config.num_layers)

    return replace(stream, layers=layers)


def in_memory(stream: ModelStream) -> Model:
    """The whole model at once: for small ones."""
    head = None if stream.head is None else np.concatenate(list(stream.head()))
    embedding = np.concatenate(list(stream.embedding()))
    return Model(stream.config, embedding, stream.final_norm, list(stream.layers()), head)


def _parameters(c: ModelConfig) -> int:
    return c.vocab_size * c.hidden_size + c.num_layers * sum(rows * cols for _, rows, cols in c.projections())


def _golden(stream: ModelStream, files: TokenizerFiles) -> tuple[list[dict[str, Any]], list[str]]:
    """Greedy ids by the oracle, where the model is small enough for it; else none, and a sentence."""
    from engine.reference import Reference

    size = _parameters(stream.config)
    if size >= ORACLE_PARAMETERS:
        return [], [f"No golden tokens: the oracle is too slow for {size / 1e6:.0f} M parameters."]
    prompt = [*files.facts.opening, *files.tokenizer.encode(GOLDEN_PROMPT)]
    count = min(GOLDEN_TOKENS, stream.config.max_seq_len - len(prompt))
    if count < 1:
        return [], ["No golden tokens: the context is too short for a prompt."]
    ids = Reference(in_memory(stream)).greedy(prompt, count)
    end = next((i for i, token in enumerate(ids) if token in files.facts.stops), count - 1)
    return [{"prompt": GOLDEN_PROMPT, "prompt_ids": prompt, "ids": ids[: end + 1]}], []


def _hashes(files: dict[str, Path], progress: Progress) -> dict[str, Any]:
    """The files that were read, with size and sha256, so that another can repeat the import."""
    hashes = {}
    for index, (name, path) in enumerate(files.items()):
        progress("hashes", index, len(files))
        hashes[name] = _facts(path)
    progress("hashes", len(files), len(files))
    return hashes


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}
