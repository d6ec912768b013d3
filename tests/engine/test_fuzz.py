"""Every parser on what fuzzing has kept, on new mutations of it, and on the inputs that once broke one.

The long runs, guided by coverage, are tests/fuzz: docs/testing.md.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from engine.errors import HaloError
from engine.formats.hf_tokenizer import read_tokenizer
from tests.fuzz.corpus import read_corpus
from tests.fuzz.guard import PER_BYTE
from tests.fuzz.mutate import mutations
from tests.fuzz.target import Target, hostile, pack_files
from tests.fuzz.targets import TARGETS
from tests.fuzz.text_seeds import HASH, tokenizers
from tests.fuzz.text_targets import model_config

SECONDS = 0.25  # of new mutations for each target
ROOM = 12 << 20  # bytes that any input may take: caches, and the 8 MiB that a manifest is read into


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def pool_of(target: Target) -> list[bytes]:
    return [*target.seeds(), *hostile(target), *read_corpus(target.name)]


def test_what_was_kept_is_read_or_refused(target: Target, tmp_path: Path) -> None:
    """A crash that fuzzing has found once would come back unseen; a traceback is all that a person gets."""
    assert any([target(data, tmp_path) for data in pool_of(target)]), "no input at all is read"


def test_new_mutations_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    """A file that was damaged on its way gives a sentence and a hint, whatever the damage."""
    end = time.monotonic() + SECONDS
    for data in itertools.islice(mutations(11, pool_of(target), target.words), 5000):
        try:
            target(data, tmp_path)
        except Exception:
            kept = tmp_path.parent / f"{target.name}.input"
            kept.write_bytes(data)
            print(f"the input is {kept}")
            raise
        if time.monotonic() > end:
            break


def test_memory_is_the_inputs_size_times_a_constant(target: Target, tmp_path: Path) -> None:
    """A file of a few bytes that says it holds a terabyte must not take the machine's memory."""
    pool = pool_of(target)
    longest = sorted(pool, key=len)[-3:]
    target(pool[0], tmp_path)  # imports
    for data in [*longest, *random.Random(5).sample(pool, min(len(pool), 12))]:
        tracemalloc.start()
        try:
            target(data, tmp_path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= ROOM + PER_BYTE * target.expanded(data), (len(data), data[:200])


DESCRIBED = {"schema": 1, "name": "m", "files": {"f": {"sha256": HASH, "bytes": 1}}}


HEAD_LINE = f"# model.halo: 1 bytes, of the first MiB {HASH}\n"


def described(**facts: object) -> bytes:
    return json.dumps(DESCRIBED | {"files": {"f": {"sha256": HASH, "bytes": 1} | facts}}).encode()


def linked() -> bytes:
    """A bundle whose manifest is a link to nothing."""
    member = tarfile.TarInfo("bundle.json")
    member.type, member.linkname = tarfile.LNKTYPE, "nothing"
    return member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


def sparse_member() -> bytes:
    """A bundle of 3 KB with a member of a terabyte of zeros."""
    made = io.BytesIO()
    manifest = json.dumps({"schema": 1, "files": {"a": HASH}}).encode()
    with tarfile.open(fileobj=made, mode="w") as tar:
        first, hole = tarfile.TarInfo("bundle.json"), tarfile.TarInfo("a")
        first.size = len(manifest)
        tar.addfile(first, io.BytesIO(manifest))
        hole.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
        tar.addfile(hole)
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model_json", described(bytes=float("inf"))),
        ("model_json", described(bytes="1")),
        ("model_json", described(sha256=["a"] * 64)),
        ("model_json", json.dumps(DESCRIBED | {"files": {"\ud800": {"sha256": HASH, "bytes": 1}}}).encode()),
        (
            "store",
            pack_files({"model.json": json.dumps(DESCRIBED).replace('"f"', f'"{"f" * 300}"').encode()}),
        ),
        ("halo_toml", b"a = " + b"9" * 9000),
        ("halo_toml", b"a = " + b"[" * 9000),
        ("generation", pack_files({"manifest.json": b'{"a":' * 9000})),
        ("journal", b"[" * 9000),
        ("seal", pack_files({"SHA256SUMS": f"+{HASH}  a\0b\n{HEAD_LINE}".encode()})),
        ("bundle", linked()),
        ("bundle", sparse_member()),
        ("hub", pack_files({"tree": b"[]", "link": b'<//[/n>; rel="next"'})),
    ],
)
def test_what_once_was_a_traceback_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    """Found by reading and by the first runs of the fuzzer."""
    assert TARGETS[name](data, tmp_path) in (False, name == "journal")


def test_one_long_token_does_not_take_seconds(tmp_path: Path) -> None:
    """A tokenizer.json of 13 KB took 5 s to check, for a token is merged again byte by byte."""
    made = tokenizers()["llama3"]
    ids = {text: index for text, index in made["model"]["vocab"].items() if index < 256}
    made["model"] |= {
        "vocab": ids | {"aa": 256, "a" * 9000: 257},
        "merges": [["a", "a"]],
        "ignore_merges": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), "utf-8")
    with pytest.raises(HaloError, match="longer than any language's"):
        read_tokenizer(tmp_path, model_config(261))


def test_an_os_release_with_an_open_quote_has_no_name(tmp_path: Path) -> None:
    """The install would have ended in a traceback while it named the distribution in a hint."""
    assert TARGETS["os_release"](b'PRETTY_NAME="Debian', tmp_path)
