"""Which models this machine has, and whether one is whole. It neither opens a model nor fetches one."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.formats.seal import DESCRIPTION, PREPARED, SEAL, TOKENIZERS, problems, read_seal, sha256_of
from engine.formats.store import read_description
from engine.locate import read_card
from engine.model import ModelConfig

PULL_RECORD: Final = "pull.json"
_MANY: Final = 10_000  # entries of a directory that is looked through for models


@dataclass(frozen=True)
class Known:
    """One model directory. Counts are 0 and texts empty where they cannot be read; `problem` says why."""

    path: Path
    name: str
    family: str = ""
    parameters: int = 0
    bytes: int = 0
    context: int = 0
    source: str = ""
    used_by: list[str] = field(default_factory=list)
    problem: str = ""


def known_models(given: Iterable[Path], environ: Mapping[str, str]) -> list[Known]:
    """Models in `given` directories (each a model, or a folder of models), and the ones that halo knows of.

    Those are: what the generations beside the running one link to, their store, HALO_MODEL, and what lies
    in the current directory.
    """
    users = _users(environ)
    folders: list[Path] = [*given]
    if not folders:
        folders = [*{directory.parent for directory in users}, Path.cwd()]
        if environ.get("HALO_MODEL"):
            folders.append(Path(environ["HALO_MODEL"]))
    found = {path.resolve() for folder in folders for path in _models_in(folder)}
    if not given:
        found |= users.keys()
    return sorted((_describe(path, users.get(path, [])) for path in found), key=lambda m: (m.name, m.path))


def _users(environ: Mapping[str, str]) -> dict[Path, list[str]]:
    """Model directories that generations link to, and the ids of those generations."""
    users: dict[Path, list[str]] = {}
    if environ.get("HALO_GENERATION_DIR"):
        running = Path(environ["HALO_GENERATION_DIR"]).resolve()
        siblings = _children(running.parent) if running.parent.name == "generations" else [running]
        for generation in siblings:
            for link in _children(generation / "models"):
                directory = link.resolve()
                if directory.is_dir() and generation.name not in users.setdefault(directory, []):
                    users[directory].append(generation.name)
    return users


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry, _ in zip(entries, range(_MANY), strict=False))
    except OSError:
        return []


def _models_in(folder: Path) -> Iterator[Path]:
    if _is_file(folder / DESCRIPTION):
        yield folder
        return
    for path in _children(folder):
        if not path.name.startswith(".") and _is_file(path / DESCRIPTION):
            yield path


def _is_file(path: Path) -> bool:
    """Whether there is a file, as far as this user may know: another's directory is no error."""
    try:
        return path.is_file()
    except OSError:
        return False


def _describe(path: Path, used_by: list[str]) -> Known:
    from engine.formats.prepared import read_directory

    size = sum(child.stat().st_size for child in _children(path) if _is_file(child))
    name = path.name
    try:
        card = read_card(path)
        name = card.name
        config = read_directory(path / PREPARED)[0]
    except HaloError as error:
        return Known(path, name, bytes=size, used_by=used_by, problem=error.message)
    return Known(
        path=path,
        name=name,
        family=family(config),
        parameters=parameters(config),
        bytes=size,
        context=min(card.context, config.max_seq_len),
        source=_source(path),
        used_by=used_by,
    )


def family(config: ModelConfig) -> str:
    """The graph in two words: whose architecture, and what differs."""
    if config.activation == "relu2" and config.sub_norms:
        return "bitnet"
    if config.activation == "silu" and not config.sub_norms:
        return "llama"
    return f"bitnet, {config.activation}, {'with' if config.sub_norms else 'no'} sub-norms"


def parameters(config: ModelConfig) -> int:
    """Weights of a model: its matrices and norms, a tied embedding once."""
    matrices = sum(rows * cols for _, rows, cols in config.projections())
    norms = 2 * config.hidden_size
    if config.sub_norms:
        norms += config.q_size + config.intermediate_size
    tables = 1 if config.tie_embeddings else 2
    outside = tables * config.vocab_size * config.hidden_size + config.hidden_size
    return config.num_layers * (matrices + norms) + outside


def _source(path: Path) -> str:
    """REPO@COMMIT of a model that was pulled."""
    try:
        record = json.loads((path / PULL_RECORD).read_bytes())
        return f"{record['repo']}@{record['commit']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


@dataclass(frozen=True)
class Verdict:
    """What a check of every byte found: the files that are whole, and what is wrong with the others."""

    whole: list[str]
    problems: list[tuple[str, str]]
    cure: str


def verify(directory: Path) -> Verdict:
    """Check every byte of a model directory: its seal, model.json's hashes, each tensor, the vocabulary.

    Raises HaloError (exit code 3) where there is no model to check.
    """
    if not _is_file(directory / DESCRIPTION) and not _is_file(directory / PREPARED):
        raise HaloError(
            f"There is no model in {directory}.",
            hint="`halo model list` shows the models that halo knows of",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    found: dict[str, str] = {}
    names: set[str] = {SEAL}
    try:
        names |= read_seal(directory)[0].keys()
        found |= dict(problems(directory))
    except HaloError as error:
        found[SEAL] = error.message
    for name, problem in _against_description(directory, names):
        found.setdefault(name, problem)
    for name, problem in _inside(directory):
        found[name] = f"{found[name]}: {problem}" if name in found else problem
    return Verdict(sorted(names - found.keys()), sorted(found.items()), _cure(directory, set(found)))


def _against_description(directory: Path, names: set[str]) -> Iterator[tuple[str, str]]:
    """What differs from the sizes and hashes in model.json; every name it lists is added to `names`."""
    try:
        read_card(directory)
        files = read_description(directory)["files"]
    except HaloError as error:
        yield DESCRIPTION, error.message
        return
    for name, facts in files.items():
        names.add(name)
        try:
            size = (directory / name).stat().st_size
            if size != facts["bytes"]:
                yield name, f"has {size} bytes; {DESCRIPTION} says {facts['bytes']}"
            elif sha256_of(directory / name) != facts["sha256"]:
                yield name, f"does not have the sha256 that {DESCRIPTION} names"
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:
            yield name, f"cannot be read: {error.strerror}"


def _inside(directory: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with the tensors, by name, and with the tokenizer beside them."""
    from engine.formats.prepared import verify_prepared
    from engine.tokenizer import load_tokenizer
    from engine.tokenizer_facts import read_facts

    vocabulary = 0
    try:
        vocabulary = verify_prepared(directory / PREPARED).vocab_size
    except HaloError as error:
        yield PREPARED, error.message
    name = next((name for name in TOKENIZERS if _is_file(directory / name)), TOKENIZERS[0])
    try:
        read_facts(directory / DESCRIPTION)
    except HaloError as error:  # it says what the tokenizer's file does not
        yield DESCRIPTION, error.message
        return
    try:
        size = load_tokenizer(directory).size
    except HaloError as error:
        if isinstance(error.__cause__, ImportError):  # no damage, but no verdict either
            raise HaloError(error.message, hint=error.hint, exit_code=EXIT_COULD_NOT_RUN) from error
        yield name, error.message
        return
    if vocabulary and size != vocabulary:
        yield name, f"has {size} tokens, and the model {vocabulary}: it is another model's"


def _cure(directory: Path, damaged: set[str]) -> str:
    """The command that brings the model back."""
    kept = [path for path in _children(directory) if path.suffix in (".h1b", ".gguf")]
    if len(kept) == 1 and damaged <= {PREPARED, SEAL}:
        return f"make it anew from {kept[0].name}: halo model prepare {shlex.quote(str(directory))}"
    source = _source(directory)
    if source:
        return f"fetch it again: halo model pull {source} NEW_DIRECTORY"
    if directory.resolve().name.startswith("sha256-"):
        return "halo install mends the bundled model"
    return "import it again: halo model import SRC NEW_DIRECTORY"
