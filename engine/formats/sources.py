"""Whatever a model comes as, opened: its layers as a stream, its tokenizer, the files it was read from.

A checkpoint folder, a GGUF file, a .h1b file, or a model directory. Nothing is written here: importer.py and
exporter.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import HaloError
from engine.formats.htok import Vocabulary, read_htok
from engine.model import ModelConfig, ModelStream

if TYPE_CHECKING:
    from engine.formats.gguf_model import Activation

MAX_TEMPLATE: Final = 1 << 20
_WHAT: Final = "give a checkpoint's folder (with config.json), a .gguf or a .h1b file, or a model directory"
_GIVE: Final = "give it with --tokenizer: a .htok file, or the folder of the model's checkpoint"


@dataclass
class Source:
    """An opened model. `files` are what was read, by the name to record; `notes()` after the last pass."""

    format: str
    stream: ModelStream
    vocabulary: Vocabulary
    files: dict[str, Path]
    notes: Callable[[], list[str]] = field(default=lambda: [])
    template: str = ""
    name: str = "model"


def open_source(path: Path, tokenizer: Path | None = None, activation: Activation | None = None) -> Source:
    """Open the model at `path`. `tokenizer`, a .htok or a checkpoint's folder, wins over the model's own.

    Raises HaloError with the reason where there is none, it is damaged, or it is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, tokenizer, activation)
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise HaloError(f"The model {path} cannot be read: {error.strerror}.", hint=_WHAT) from error
    if magic[:4] == b"GGUF":
        return _open_gguf(path, tokenizer, activation)
    if activation is not None:
        raise HaloError(f"{path} says its activation itself.", hint="leave --activation out")
    if magic[:4] == b"H1B\0":
        return _open_h1b(path, tokenizer)
    if magic == b"HALOPREP":
        return _open_prepared(path, tokenizer)
    raise HaloError(f"{path} is no model that halo reads.", hint=_WHAT)


def _open_directory(path: Path, tokenizer: Path | None, activation: Activation | None) -> Source:
    if (path / "config.json").is_file():
        if activation is not None:
            raise HaloError(f"{path / 'config.json'} says the activation.", hint="leave --activation out")
        return _open_checkpoint(path, tokenizer)
    if (path / "model.halo").is_file():
        return _open_prepared(path / "model.halo", tokenizer)
    found = sorted(each for each in path.iterdir() if each.suffix in (".gguf", ".h1b") and each.is_file())
    if len(found) == 1:
        return open_source(found[0], tokenizer, activation)
    if found:
        names = ", ".join(each.name for each in found[:4])
        raise HaloError(f"{path} holds several models: {names}.", hint="give one of the files")
    raise HaloError(f"There is no model in {path}.", hint=_WHAT)


def _open_checkpoint(path: Path, tokenizer: Path | None) -> Source:
    from engine.formats.hf import open_checkpoint
    from engine.formats.hf_tokenizer import read_tokenizer

    checkpoint = open_checkpoint(path)
    files = {name: path / name for name in checkpoint.files}
    if tokenizer is None:
        vocabulary = read_tokenizer(path, checkpoint.config)
        files["tokenizer.json"] = path / "tokenizer.json"
    else:
        vocabulary = read_vocabulary(tokenizer, checkpoint.stream.config)
    template = _template_of(path)
    name = path.resolve().name
    return Source(
        "huggingface", checkpoint.stream, vocabulary, files, lambda: checkpoint.notes, template, name
    )


def _open_gguf(path: Path, tokenizer: Path | None, activation: Activation | None) -> Source:
    from engine.formats.gguf_model import open_gguf
    from engine.formats.gguf_tokenizer import PREFIX, gguf_vocabulary

    model = open_gguf(path, activation)
    config, metadata = model.stream.config, model.file.metadata
    if tokenizer is None:
        vocabulary, notes = gguf_vocabulary(model.file, config.vocab_size)
    else:
        ends = {which: metadata.get(f"{PREFIX}{which}_token_id") for which in ("bos", "eos")}
        vocabulary, notes = read_vocabulary(tokenizer, config, ends), []
    template, name = metadata.get("tokenizer.chat_template"), metadata.get("general.name")
    return Source(
        "gguf", model.stream, vocabulary, {path.name: path},
        lambda: [*model.form_notes(), *model.notes, *notes],
        template if isinstance(template, str) else "",
        name if isinstance(name, str) and name else path.stem,
    )  # fmt: skip


def _open_h1b(path: Path, tokenizer: Path | None) -> Source:
    from engine.formats.h1b import stream_h1b

    stream = stream_h1b(path)
    beside = _beside(path, tokenizer)
    vocabulary = read_vocabulary(beside, stream.config)
    files = {path.name: path} | ({beside.name: beside} if beside.is_file() else {})
    return Source("h1b", stream, vocabulary, files, name=path.stem)


def _open_prepared(path: Path, tokenizer: Path | None) -> Source:
    if (path.parent / "model.h1b").is_file():
        return _open_h1b(path.parent / "model.h1b", tokenizer)
    raise HaloError(f"{path} is a prepared model, and nothing lies beside that it was made from.", hint=_WHAT)


def _beside(path: Path, tokenizer: Path | None) -> Path:
    """The tokenizer that was given, or the one that lies beside a model file."""
    if tokenizer is not None:
        return tokenizer
    for name in ("tokenizer.htok", f"{path.stem}.htok"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise HaloError(f"No tokenizer lies beside {path}.", hint=_GIVE)


def read_vocabulary(path: Path, config: ModelConfig, ends: Mapping[str, object] | None = None) -> Vocabulary:
    """A tokenizer by itself: a .htok file, a tokenizer.json, or the folder that has one.

    `ends` are the ids of bos and eos where the model's own file says them. Raises HaloError where it is of
    another size than the model.
    """
    from engine.formats.hf_config import FAMILIES, HfConfig
    from engine.formats.hf_tokenizer import read_tokenizer

    if path.is_file() and path.suffix != ".json":
        vocabulary = read_htok(path)
        if len(vocabulary.tokens) != config.vocab_size:
            raise HaloError(
                f"The tokenizer {path} has {len(vocabulary.tokens)} tokens, the model {config.vocab_size}.",
                hint=_GIVE,
            )
        return vocabulary
    folder = path.parent if path.is_file() else path
    if not (folder / "tokenizer.json").is_file():
        raise HaloError(f"There is no tokenizer at {path}.", hint=_GIVE)
    bos, eos = ((ends or {}).get(which) for which in ("bos", "eos"))
    plain = HfConfig(
        config, "none", False,
        bos if type(bos) is int else None, eos if type(eos) is int else None, FAMILIES["LlamaForCausalLM"],
    )  # fmt: skip
    return read_tokenizer(folder, plain)


def _template_of(folder: Path) -> str:
    """The chat template that a folder carries: its own file, or the text in tokenizer_config.json."""
    from engine.formats.hf_config import read_object
    from engine.formats.hf_tokenizer import MAX_TOKENIZER

    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file() and own.stat().st_size <= MAX_TEMPLATE:
        return own.read_text("utf-8", "replace")
    template = read_object(config, MAX_TOKENIZER).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else ""
