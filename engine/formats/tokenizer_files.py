"""What becomes of a checkpoint's tokenizer and chat template in a model directory. Not how they are used.

Llama-3's kind becomes tokenizer.htok, which needs no library of its own. Any other BPE stays tokenizer.json
or tokenizer.model, after the library that will read it has read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engine.atomic import replacing
from engine.chat import JINJA, Message, render
from engine.chat_template import ChatTemplate
from engine.errors import HaloError
from engine.formats.hf_config import HfConfig, read_object
from engine.formats.hf_tokenizer import MAX_TOKENIZER, read_tokenizer
from engine.formats.htok import Vocabulary, write_htok
from engine.tokenizer import TextTokenizer, Tokenizer
from engine.tokenizer_facts import TEMPLATE_FILE, TokenizerFacts, read_template
from engine.tokenizer_library import LibraryMissing, load_library_tokenizer, read_bounded

JSON: Final = "tokenizer.json"
MODEL: Final = "tokenizer.model"
HTOK: Final = "tokenizer.htok"
CONFIG: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"
_ENDS_OF_TURN: Final = ("<|eot_id|>", "<|im_end|>")
_NAMES: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
_SAMPLE: Final = (
    Message("system", "Be brief."), Message("user", " Hi \n"), Message("assistant", "Hello."),
    Message("user", "ls?"),
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on its way into a model directory.

    `write` puts its files there; `facts` is `tokenizer` of model.json and `chat_template` its chat_template;
    `read` are the files of the checkpoint that it was made from; `notes` are for the person.
    """

    tokenizer: TextTokenizer
    facts: TokenizerFacts
    chat_template: str
    vocabulary: Vocabulary | None = None
    kept: tuple[str, bytes] | None = None
    template: str | None = None
    read: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, directory: Path) -> list[str]:
        """Write the files and return their names. Raises OSError where they cannot be written."""
        names = []
        if self.vocabulary is not None:
            write_htok(directory / HTOK, self.vocabulary)
            names.append(HTOK)
        plain = dict([self.kept] if self.kept else [])
        if self.template is not None:
            plain[TEMPLATE_FILE] = self.template.encode()
        for name, data in plain.items():
            with replacing(directory / name) as file:
                file.write(data)
        return [*names, *plain]


def tokenizer_files(directory: Path, config: HfConfig) -> TokenizerFiles:
    """The tokenizer and template of a checkpoint.

    Raises HaloError with the reason where halo has none for it, or it needs a library that is not installed.
    """
    directory = Path(directory)
    read = {
        name: directory / name for name in (JSON, MODEL, CONFIG, GENERATION) if (directory / name).exists()
    }
    said = {name: _object(directory / name) for name in (CONFIG, GENERATION)}
    vocabulary, kept = None, None
    try:
        vocabulary = read_tokenizer(directory, config)
        tokenizer: TextTokenizer = Tokenizer(vocabulary)
        facts = _facts(tokenizer, said, opening=_opening(directory, said, tokenizer, default=True))
    except HaloError as error:
        if not read.keys() & {JSON, MODEL}:
            raise
        tokenizer, facts = _by_library(directory, config, said, error)
        name = JSON if JSON in read else MODEL
        kept = (name, read_bounded(directory / name))
    source = checkpoint_template(directory)
    chosen = choose_template(source, tokenizer, facts)
    return TokenizerFiles(tokenizer, facts, chosen[0], vocabulary, kept, chosen[1], read, chosen[2])


def vocabulary_files(vocabulary: Vocabulary, source: str | None = None) -> TokenizerFiles:
    """The same for a vocabulary that came otherwise (GGUF, .htok), with the template beside it."""
    tokenizer = Tokenizer(vocabulary)
    facts = _facts(tokenizer, {}, opening=(vocabulary.bos,))
    chosen = choose_template(source, tokenizer, facts)
    return TokenizerFiles(tokenizer, facts, chosen[0], vocabulary, None, chosen[1], {}, chosen[2])


def checkpoint_template(directory: Path) -> str | None:
    """The chat template that a checkpoint carries: chat_template.jinja, else tokenizer_config.json's.

    Of several by name, the one named default. None where it has none.
    """
    own = read_template(directory)
    if own is not None:
        return own
    said = _object(directory / CONFIG).get("chat_template")
    if isinstance(said, list):
        named = [each for each in said if isinstance(each, dict) and each.get("name") == "default"]
        said = named[0].get("template") if named else None
    return said if isinstance(said, str) and said else None


def choose_template(
    source: str | None, tokenizer: TextTokenizer, facts: TokenizerFacts
) -> tuple[str, str | None, list[str]]:
    """(chat_template of model.json, the Jinja source to keep, notes).

    A template that gives the ids of halo's own "bitnet" is that, and spares jinja2's import; one that cannot
    be used is left out with a note, for the model still runs without it.
    """
    if source is None:
        return "bitnet", None, ["The checkpoint has no chat template; halo chat uses its template bitnet."]
    try:
        source.encode()
        ChatTemplate(source, tokenizer.special, dict(facts.names))
    except UnicodeEncodeError:  # JSON may hold half a surrogate pair
        note = (
            "The checkpoint's chat template is no Unicode text; halo chat uses its template bitnet instead."
        )
        return "bitnet", None, [note]
    except HaloError as error:
        return "bitnet", None, [f"{error.message} halo chat uses its template bitnet instead."]
    tokenizer.chat_template, tokenizer.names = source, dict(facts.names)
    try:
        same = render(_SAMPLE, tokenizer, JINJA) == render(_SAMPLE, tokenizer, "bitnet")
    except HaloError:  # it takes no system prompt, say
        same = False
    return ("bitnet", None, []) if same else (JINJA, source, [])


def _by_library(
    directory: Path, config: HfConfig, said: dict[str, dict[str, Any]], reason: HaloError
) -> tuple[TextTokenizer, TokenizerFacts]:
    """The tokenizer through its library, with bos and eos from the files beside it."""
    size = config.model.vocab_size
    bare = TokenizerFacts(size, config.bos or 0, config.eos or config.bos or 0, (), ())
    try:
        tokenizer = load_library_tokenizer(directory, bare)
    except LibraryMissing as error:
        if not (directory / JSON).exists():
            raise
        raise HaloError(
            f"{reason.message.rstrip('.')}; the library tokenizers, which reads it, is not installed.",
            hint=error.hint,
        ) from error
    named = {name: _named(tokenizer, said[CONFIG], name) for name in ("bos", "eos")}
    eos = config.eos if config.eos is not None else named["eos"]
    bos = config.bos if config.bos is not None else named["bos"]
    if eos is None or max(eos, bos or 0) >= size:
        raise HaloError(
            f"Nothing in {directory} names a token of its {size} that ends a text.",
            hint="ask the checkpoint's publisher for eos_token_id",
        )
    bos = eos if bos is None else bos
    tokenizer = load_library_tokenizer(directory, TokenizerFacts(size, bos, eos, (), ()))
    opening = _opening(directory, said, tokenizer, default=(directory / MODEL).exists())
    return tokenizer, _facts(tokenizer, said, opening=opening)


def _facts(
    tokenizer: TextTokenizer, said: dict[str, dict[str, Any]], *, opening: tuple[int, ...]
) -> TokenizerFacts:
    """What model.json says: the ends that generation_config.json lists too, and the template's variables."""
    listed = said.get(GENERATION, {}).get("eos_token_id")
    stops = [id_ for id_ in (listed if isinstance(listed, list) else [listed]) if type(id_) is int][:16]
    stops += [tokenizer.special[text] for text in _ENDS_OF_TURN if text in tokenizer.special]
    names = {name: text for name in _NAMES if (text := _text(said.get(CONFIG, {}).get(name)))}
    if CONFIG not in said or not said[CONFIG]:
        names = {"bos_token": tokenizer.names["bos_token"], "eos_token": tokenizer.names["eos_token"]}
    return TokenizerFacts(
        tokenizer.size,
        tokenizer.bos,
        tokenizer.eos,
        opening,
        tuple(sorted({each for each in (*stops, tokenizer.eos) if 0 <= each < tokenizer.size})),
        tuple(sorted(names.items())),
    )


def _opening(
    directory: Path, said: dict[str, dict[str, Any]], tokenizer: TextTokenizer, *, default: bool
) -> tuple[int, ...]:
    """(bos,) where the library puts it before a text: add_bos_token, else tokenizer.json's post-processor."""
    adds = said[CONFIG].get("add_bos_token")
    if not isinstance(adds, bool):
        path = directory / JSON
        data = read_object(path, MAX_TOKENIZER) if path.exists() else {}
        found = list(_templates(data.get("post_processor")))
        text = next((text for text, index in tokenizer.special.items() if index == tokenizer.bos), None)
        adds = any(text == each for each in found) if found else default
    return (tokenizer.bos,) if adds else ()


def _templates(processor: object) -> list[str]:
    """The special token that each TemplateProcessing begins a single text with."""
    if not isinstance(processor, dict):
        return []
    if processor.get("type") == "Sequence":
        steps = processor.get("processors")
        return [text for each in steps for text in _templates(each)] if isinstance(steps, list) else []
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
        return []
    first = single[0].get("SpecialToken") if isinstance(single[0], dict) else None
    return [str(first.get("id"))] if isinstance(first, dict) else [""]


def _named(tokenizer: TextTokenizer, config: dict[str, Any], which: str) -> int | None:
    return tokenizer.special.get(_text(config.get(f"{which}_token")) or "")


def _text(value: object) -> str | None:
    """The text of a token, which tokenizer_config.json has plain or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _object(path: Path) -> dict[str, Any]:
    return read_object(path, MAX_TOKENIZER) if path.exists() else {}
