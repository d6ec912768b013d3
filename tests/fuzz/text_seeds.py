"""Small sound texts for the fuzzer to begin from: one of each kind that halo reads."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.formats.htok import LETTER_OF
from engine.formats.seal import seal as write_seal
from engine.tokenizer import LLAMA3_PATTERN
from provision.desired import Desired
from tests.fuzz.target import pack_files

HASH = hashlib.sha256(b"x").hexdigest()
WORDS = (
    b'"Split"', b'"ByteLevel"', b'"Metaspace"', b'"Sequence"', b'"Replace"', b'"ByteFallback"', b'"Fuse"',
    b'"Strip"', b'"TemplateProcessing"', b'"WordPiece"', b'"Unigram"', b'"NFKC"', b'"Prepend"', b'"Regex"',
    b'"String"', b'"Digits"', b'"Punctuation"', b'"ignore_merges"', b'"byte_fallback"', b'"unk_token"',
    b'"dropout"', b'"truncation"', b'"padding"', b'"lstrip"', b'"special"', b'"normalized"', b'"bos_token"',
)  # fmt: skip


def model_json() -> Iterator[bytes]:
    """As an import writes it, and as the bundled model's."""
    facts = {
        "size": 272,
        "bos": 261,
        "eos": 262,
        "opening": [261],
        "stops": [262],
        "names": {"bos_token": "<s>"},
    }
    plain = {"schema": 1, "name": "m", "chat_template": "bitnet", "context": 64}
    files = {"model.h1b": {"sha256": HASH, "bytes": 1}, "tokenizer.htok": {"sha256": HASH, "bytes": 1}}
    yield json.dumps(plain | {"files": files, "tokenizer": facts}).encode()
    yield json.dumps(
        plain | {"files": files, "golden": [{"prompt": "a", "ids": [1], "prompt_ids": [1]}]}
    ).encode()


def seal() -> Iterator[bytes]:
    """A sealed directory, plain and with the mark that has its last line made anew."""
    files = {"model.json": b'{"files":{}}', "model.halo": b"m" * 40, "tokenizer.htok": b"HTOK"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        write_seal(folder)
        sums = (folder / "SHA256SUMS").read_bytes()
    for mark in (b"", b"+"):
        yield pack_files({"SHA256SUMS": mark + sums} | files)


def store() -> Iterator[bytes]:
    """A model that is plain, and one that is packed."""
    data = b"weights " * 20
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    described = json.dumps({"schema": 1, "name": "m", "files": {"model.h1b": facts}}).encode()
    for name, body in (("model.h1b", data), ("model.h1b.xz", lzma.compress(data))):
        yield pack_files({"model.json": described, name: body, "NOTICE": b"n\n"})


def tokenizer_json() -> Iterator[bytes]:
    """Llama-3's kind, another byte-level one, LLaMA-2's with byte fallback; with and without a template."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim }}</s>{% endfor %}"
    written = {name: json.dumps(made, ensure_ascii=False).encode() for name, made in tokenizers().items()}
    yield pack_files({"tokenizer.json": written["llama3"]})
    said = json.dumps(config | {"chat_template": template}).encode()
    yield pack_files({"tokenizer.json": written["llama3"], "tokenizer_config.json": said})
    generation = json.dumps({"eos_token_id": [262, 5]}).encode()
    yield pack_files({"tokenizer.json": written["gpt2"], "generation_config.json": generation})
    yield pack_files(
        {"tokenizer.json": written["llama2"], "tokenizer_config.json": json.dumps(config).encode()}
    )


def tokenizers() -> dict[str, dict[str, Any]]:
    """The tokenizer.json of each kind: byte-level with two patterns, and with byte fallback."""
    merges = [["t", "h"], ["th", "e"]]
    ids = {text: i for i, text in enumerate([*LETTER_OF.values(), "th", "the"])}
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": 260 + i, "content": text, **options, "special": True} for i, text in enumerate(("<s>", "</s>"))
    ]
    added[0]["id"], added[1]["id"] = 261, 262
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    llama3 = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    }
    gpt2 = llama3 | {"pre_tokenizer": level | {"use_regex": True}}
    texts = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "t", "h", "<s>", "</s>", "th"]
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    decoders = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    places = [token | {"id": texts.index(str(token["content"]))} for token in added]
    llama2 = {
        "version": "1.0",
        "added_tokens": places,
        "pre_tokenizer": first,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True,
            "vocab": {text: i for i, text in enumerate(texts)}, "merges": [["t", "h"]],
        },
    }  # fmt: skip
    return {"llama3": llama3, "gpt2": gpt2, "llama2": llama2}


def tokenizer_model() -> Iterator[bytes]:
    """SentencePiece's protobuf (google/sentencepiece, sentencepiece_model.proto), put together by hand."""

    def field(number: int, data: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(data)) + data

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    pieces += [("\u2581", 1), ("t", 1), ("h", 1), ("th", 1), ("\u2581th", 1)]
    model = b""
    for place, (text, kind) in enumerate(pieces):
        body = field(1, text.encode()) + b"\x15" + struct.pack("<f", -float(place)) + b"\x18" + bytes([kind])
        model += field(1, body)
    trainer = b"\x18\x02" + _varint(35 << 3) + b"\x01"  # model_type BPE, byte_fallback
    normalizer = field(1, b"identity") + b"\x18\x01\x20\x00\x28\x01"
    yield model + field(2, trainer) + field(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def template() -> Iterator[bytes]:
    """The common kinds of chat template."""
    yield b"{% for m in messages %}{{ m['role']|capitalize + ':' + m['content']|trim }}<|eot_id|>{% endfor %}"
    yield (
        b"{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        b"{% endfor %}"
        b"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    yield (
        b"{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}"
        b"{% set ns.n = ns.n + 1 %}{% if loop.first %}{{ raise_exception('x') if ns.n > 9 }}{% endif %}"
        b"{{ '<|' ~ m.role ~ '|>' }}{{ m.content | tojson(indent=1) | indent(2) }}"
        b"{{ m.role | replace('a', 'b') }}{% endfor %}"
    )
    yield b"{% macro f(x) %}{{ x ~ ['a', 1] | join(', ') }}{% endmacro %}{{ f(messages[0].role)[:5] % () }}"
    yield b"{% for m in messages|groupby('role') %}{% generation %}{{ m[0] }}{% endgeneration %}{% endfor %}"


def halo_toml() -> Iterator[bytes]:
    """As `halo install` writes it."""
    yield Desired().text().encode()
    yield Desired("strix-halo", "[::]:8180", False).text().encode()
    yield b'listen = "localhost:1"\nprofile = "cpu" # c\n[table]\na = [1, 2.5, 1979-05-27]\n'


def generation() -> Iterator[bytes]:
    """A manifest with its model's description."""
    manifest = {
        "schema": 1, "id": "0.1.0-abc", "version": "0.1.0", "scope": "user", "files": {"bin/halo": HASH},
        "model": {"store": "sha256-x"},
    }  # fmt: skip
    model = next(model_json())
    toml = Desired().text().encode()
    yield pack_files({"manifest.json": json.dumps(manifest).encode(), "model.json": model, "halo.toml": toml})


def journal() -> Iterator[bytes]:
    """Three records, the last of them cut."""
    yield b'{"at": "t", "step": "run", "what": "install", "event": "started"}\n{"a": [1]}\n{"at": "t", "st'


def os_release() -> Iterator[bytes]:
    """Debian's."""
    yield b"PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nNAME='Debian'\nVERSION_ID=12\n"


def facts() -> Iterator[bytes]:
    """What was recorded on a real Debian, without its longest records; and one record of each kind."""
    for path in sorted((Path(__file__).parents[1] / "checks" / "fixtures" / "captured").glob("*"))[:1]:
        if path.is_file():
            yield path.read_bytes()[:20000] + b"\n@end\n"
    yield (
        b'halo-facts 1 65536\n@file present /etc/os-release\n ID=debian\n VERSION_ID="12"\n'
        b"@file present /proc/meminfo\n MemTotal: 100 kB\n@path dir rw- /x\n@disk /x\n 1 2 3\n"
        b"@tool cmake /usr/bin/cmake\n@env PATH\n /bin\n@list /sys/class/kfd/kfd/topology/nodes\n 0\n 1\n"
        b"@file present /sys/class/kfd/kfd/topology/nodes/1/properties\n gfx_target_version 110501\n"
        b"@cmd id\n uid=0(root) gid=0(root)\n@exit 0\n@file denied /root/x\n@end\n"
    )


def keys() -> Iterator[bytes]:
    """Two keys and a comment."""
    yield f"# mine\n{HASH}\n\n{HASH.upper()} # of another\n".encode()


def bundle() -> Iterator[bytes]:
    """A tar with its manifest first."""
    data = b"print()\n"
    manifest = {"schema": 1, "files": {"provision/cli.py": hashlib.sha256(data).hexdigest()}}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in (("bundle.json", json.dumps(manifest).encode()), ("provision/cli.py", data)):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    yield made.getvalue()[:4096]
