"""Write a model as a file that other programs read: .h1b 2 and 4, GGUF in TQ2_0 and I2_S. Not an import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import HaloError
from engine.formats.importer import Progress, watched
from engine.formats.sources import Source, open_source

if TYPE_CHECKING:
    from engine.formats.gguf_model import Activation

H1B: Final = {"h1b2": 2, "h1b4": 4}
GGUF: Final = ("tq2_0", "i2_s")
FORMATS: Final = (*H1B, *GGUF)


@dataclass(frozen=True)
class ExportOptions:
    """How to write a GGUF file; of .h1b nothing is to choose.

    `embedding` is f16, bf16 or f32; `architecture` is "" for the format's own; with `exact`, what would be
    rounded is written in a form that holds it, or refused.
    """

    embedding: str = "f16"
    architecture: str = ""
    exact: bool = False
    name: str = ""


@dataclass
class ExportReport:
    """What an export did: the files it wrote, and sentences that the person should read."""

    files: list[Path]
    notes: list[str] = field(default_factory=list)


def export_model(
    source: Path,
    destination: Path,
    kind: str,
    options: ExportOptions | None = None,
    *,
    tokenizer: Path | None = None,
    activation: Activation | None = None,
    progress: Progress = lambda what, done, total: None,
) -> ExportReport:
    """Write the model `source` (a directory or file, see `sources`) as the new file `destination`.

    `kind` is one of FORMATS. With .h1b, which has no tokenizer, a .htok file is written beside. Raises
    HaloError where the format cannot hold the model, or a file exists already.
    """
    destination = Path(destination)
    if kind not in FORMATS:
        raise HaloError(f"halo does not write {kind}.", hint=f"it writes {', '.join(FORMATS)}")
    opened = open_source(source, tokenizer, activation)
    opened.stream = watched(opened.stream, progress)
    files = [destination] + ([destination.with_suffix(".htok")] if kind in H1B else [])
    for file in files:
        if file.exists():
            raise HaloError(f"{file} exists already.", hint="name a file that does not exist")
    if not destination.parent.is_dir():
        raise HaloError(f"There is no directory {destination.parent}.", hint=f"mkdir -p {destination.parent}")
    try:
        notes = _write(opened, files, kind, options or ExportOptions())
    except OSError as error:
        raise HaloError(
            f"The model cannot be written to {destination}: {error.strerror}.",
            hint=f"df -h {destination.parent}",
        ) from error
    return ExportReport(files, [*opened.notes(), *notes])


def _write(opened: Source, files: list[Path], kind: str, options: ExportOptions) -> list[str]:
    tokenizer = opened.tokenizer()
    vocabulary = tokenizer.vocabulary
    if vocabulary is None:
        raise HaloError(
            "Only a tokenizer of Llama-3's kind can be exported, and the model's is of another.",
            hint="convert the checkpoint with the other program's own tools",
        )
    if kind in H1B:
        from engine.formats.h1b import write_h1b
        from engine.formats.htok import write_htok

        write_h1b(files[0], opened.stream, H1B[kind])
        write_htok(files[1], vocabulary)
        return []
    from engine.formats.gguf_export import GgufOptions, export_gguf

    name = options.name or opened.name
    given = GgufOptions(
        kind, options.embedding, options.architecture, options.exact, name, tokenizer.template or ""
    )
    return export_gguf(files[0], opened.stream, vocabulary, given)
