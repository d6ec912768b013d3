"""A synthetic model as a directory that a server opens: a description, and a tokenizer that has every id.

Only for `halo bench --serve --synthetic`: prompts are ids, and the text of an answer is letters by chance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.bench_synthetic import SHAPES, synthetic_model

if TYPE_CHECKING:
    from engine.formats.htok import Vocabulary

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def served_model(shape: str, say: Callable[[str], None]) -> Path:
    """The directory of the synthetic model of that shape, made now if the cache has none."""
    from engine.formats.htok import write_htok
    from engine.formats.seal import SEAL, seal

    prepared = synthetic_model(shape, say)
    folder = prepared.with_suffix(".served")
    if (folder / SEAL).is_file():
        return folder
    folder.mkdir(exist_ok=True)
    config = SHAPES[shape]
    (folder / "model.halo").unlink(missing_ok=True)
    os.link(prepared, folder / "model.halo")
    write_htok(folder / "tokenizer.htok", vocabulary(config.vocab_size))
    card = {"name": f"synthetic-{shape}", "chat_template": "halo-demo", "context": config.max_seq_len}
    (folder / "model.json").write_text(json.dumps(card))
    seal(folder)
    return folder


def vocabulary(size: int) -> Vocabulary:
    """`size` tokens: two special ones, the bytes, then words of letters, the shorter first."""
    from engine.formats.htok import Vocabulary

    specials, single = [b"<|endoftext|>", b"<|eot_id|>"], [bytes([value]) for value in range(256)]
    words = ("".join(letters) for length in count(2) for letters in product(_LETTERS, repeat=length))
    tokens = [*specials, *single, *(word.encode() for word in islice(words, max(0, size - 258)))][:size]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [(ids[token[:-1]], ids[token[-1:]], index) for index, token in enumerate(tokens) if index >= 258]
    return Vocabulary(tokens, merges, bos=0, eos=0, special=[0, 1])
