"""Whatever a model comes as, opened: its layers as a stream, its tokenizer, the files it was read from.

A checkpoint folder, a GGUF file, a .h1b file, or a model directory. Nothing is written here: importer.py and
exporter.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import HaloError
from engine.model import ModelConfig, ModelStream

if TYPE_CHECKING:
    from engine.formats.gguf_model import Activation
    from engine.formats.tokenizer_files import TokenizerFiles

_WHAT: Final = "give a checkpoint's folder (with config.json), a .gguf or a .h1b file, or a model directory"
_GIVE: Final = "give it with --tokenizer: a .htok file, or the folder of the model's checkpoint"


@dataclass
class Source:
    """An opened model. `tokenizer()` reads and checks its tokenizer; `notes()` is complete after a pass.

    `files` are the files that it comes from, by the name to record, without those of the tokenizer.
    """

    format: str
    stream: ModelStream
    tokenizer: Callable[[], TokenizerFiles]
    files: dict[str, Path]
    notes: Callable[[], list[str]] = field(default=lambda: [])
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

    checkpoint = open_checkpoint(path)

    def own() -> TokenizerFiles:
        from engine.formats.tokenizer_files import tokenizer_files

        return tokenizer_files(path, checkpoint.config)

    return Source(
        "huggingface",
        checkpoint.stream,
        own if tokenizer is None else lambda: given_tokenizer(tokenizer, checkpoint.stream.config),
        {name: path / name for name in checkpoint.files},
        lambda: checkpoint.notes,
        path.resolve().name,
    )


def _open_gguf(path: Path, tokenizer: Path | None, activation: Activation | None) -> Source:
    from engine.formats.gguf_model import open_gguf
    from engine.formats.gguf_tokenizer import PREFIX, gguf_vocabulary

    model = open_gguf(path, activation)
    config, metadata = model.stream.config, model.file.metadata
    template, name = metadata.get("tokenizer.chat_template"), metadata.get("general.name")
    ends = {which: metadata.get(f"{PREFIX}{which}_token_id") for which in ("bos", "eos")}

    def own() -> TokenizerFiles:
        from engine.formats.tokenizer_files import vocabulary_files

        vocabulary, notes = gguf_vocabulary(model.file, config.vocab_size)
        files = vocabulary_files(vocabulary, template if isinstance(template, str) and template else None)
        return replace(files, notes=[*notes, *files.notes])

    return Source(
        "gguf",
        model.stream,
        own if tokenizer is None else lambda: given_tokenizer(tokenizer, config, ends),
        {path.name: path},
        lambda: [*model.form_notes(), *model.notes],
        name if isinstance(name, str) and name else path.stem,
    )


def _open_h1b(path: Path, tokenizer: Path | None) -> Source:
    from engine.formats.h1b import stream_h1b

    stream = stream_h1b(path)

    def own() -> TokenizerFiles:
        return given_tokenizer(tokenizer or _beside(path), stream.config)

    return Source("h1b", stream, own, {path.name: path}, name=path.stem)


def _open_prepared(path: Path, tokenizer: Path | None) -> Source:
    from engine.formats.prepared import read_prepared, verify_prepared

    verify_prepared(path)
    stream = read_prepared(path)

    def own() -> TokenizerFiles:
        from engine.tokenizer_facts import read_facts

        facts = read_facts(path.parent / "model.json")
        ends = {"bos": facts.bos, "eos": facts.eos} if facts else None
        return given_tokenizer(tokenizer or _beside(path), stream.config, ends)

    return Source("halo", stream, own, {path.name: path}, name=path.resolve().parent.name)


def _beside(path: Path) -> Path:
    """The tokenizer that lies beside a model file."""
    for name in ("tokenizer.htok", f"{path.stem}.htok", "tokenizer.json", "tokenizer.model"):
        if (path.parent / name).is_file():
            return path.parent / name
    raise HaloError(f"No tokenizer lies beside {path}.", hint=_GIVE)


def given_tokenizer(
    path: Path, config: ModelConfig, ends: Mapping[str, object] | None = None
) -> TokenizerFiles:
    """A tokenizer by itself: a .htok file, a tokenizer.json or tokenizer.model, or the folder that has one.

    `ends` are the ids of bos and eos where the model's own file says them. Raises HaloError where it is of
    another size than the model.
    """
    from engine.formats.hf_config import FAMILIES, HfConfig
    from engine.formats.htok import read_htok
    from engine.formats.tokenizer_files import checkpoint_template, tokenizer_files, vocabulary_files

    if path.is_file() and path.name not in ("tokenizer.json", "tokenizer.model"):
        vocabulary = read_htok(path)
        if len(vocabulary.tokens) != config.vocab_size:
            raise HaloError(
                f"The tokenizer {path} has {len(vocabulary.tokens)} tokens, the model {config.vocab_size}.",
                hint=_GIVE,
            )
        files = vocabulary_files(vocabulary, checkpoint_template(path.parent))
        return replace(files, read={path.name: path})
    folder = path.parent if path.is_file() else path
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise HaloError(f"There is no tokenizer at {path}.", hint=_GIVE)
    bos, eos = ((ends or {}).get(which) for which in ("bos", "eos"))
    plain = HfConfig(
        config, "none", False,
        bos if type(bos) is int else None, eos if type(eos) is int else None, FAMILIES["LlamaForCausalLM"],
    )  # fmt: skip
    return tokenizer_files(folder, plain)
