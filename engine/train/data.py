"""What the demo model learns from, and what is held out. It makes texts and tokens; it trains no model.

`python -m engine.train.data --data DIR --out tokenizer.json` trains the tokenizer. The three text files are
read from DIR, and their sha256 is recorded. Documents are parted by `<|endoftext|>`. 12 books, 30
stories and 500 question-and-answer pairs are held out, chosen by a fixed rule before anything is trained;
a candidate book whose text also stands in another book was passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

FILES = ("gutenberg_children.txt.xz", "ccby_stories.txt.xz", "tldr_qa.txt.xz")
SEPARATOR = "<|endoftext|>"
BOS, EOT = 0, 1
SPECIALS = ["<|endoftext|>", "<|eot_id|>"]
VOCABULARY = 8192
# The pre-tokenisation pattern of Llama 3, which BitNet-b1.58-2B-4T uses.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What `choose_held_books` gave; written down, for the choice takes a minute.
HELD_BOOKS = [45, 94, 136, 178, 241, 290, 332, 381, 423, 465, 507, 549]
# Commands that people ask for most: their pairs are shown four times as often, also without the command's
# name.
COMMON = frozenset(
    """
    ls cd cp mv rm mkdir rmdir touch cat less more head tail grep find locate which whereis tar gzip
    gunzip zip unzip xz bzip2 7z ssh scp sftp rsync ssh-keygen ssh-copy-id curl wget ping ip ifconfig
    netstat ss dig host nslookup traceroute nmap chmod chown chgrp sudo su passwd useradd usermod userdel
    groupadd groups id who whoami w uptime date cal df du free top htop ps kill killall pkill pgrep jobs
    bg fg nohup nice watch systemctl journalctl service dmesg uname hostname lsblk lscpu lsusb lspci mount
    umount fdisk mkfs dd sync apt apt-get dpkg dnf yum pacman zypper snap flatpak pip python npm docker
    docker-compose podman make gcc git git-add git-branch git-checkout git-clone git-commit git-diff
    git-fetch git-init git-log git-merge git-pull git-push git-rebase git-remote git-reset git-stash
    git-status git-tag sed awk cut sort uniq wc tr tee xargs diff patch echo printf env export alias
    history man info ln file stat tree vim nano emacs tmux screen crontab at reboot shutdown sleep time
    clear pwd basename dirname realpath sha256sum md5sum base64 openssl gpg ufw iptables nc lsof strace
    vmstat iostat ffmpeg convert jq sqlite3 psql mysql
    """.split()  # noqa: SIM905 (187 quoted words read worse)
)
ABOUT = [
    (
        "Who are you?",
        "I am the demo model of halo: a small ternary language model that runs on this machine.",
    ),
    ("What are you?", "I am a small language model. My weights are only -1, 0 and +1."),
    (
        "What can you do?",
        "I can tell a story, and I know something about Linux commands. I am small, and I am often wrong.",
    ),
    ("Hello", "Hello! Ask me about a Linux command, or ask for a story."),
    ("Hello!", "Hello! Ask me about a Linux command, or ask for a story."),
    ("Hi", "Hello! Ask me about a Linux command, or ask for a story."),
    ("Hi there", "Hello! Ask me about a Linux command, or ask for a story."),
    ("Good morning", "Good morning! Ask me about a Linux command, or ask for a story."),
    ("How are you?", "I am well, thank you. Ask me about a Linux command, or ask for a story."),
    ("What is your name?", "I am the demo model of halo."),
    ("Are you human?", "No. I am a small language model that runs on this machine."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Help", "Ask me what a command does, such as tar, or how to do something with it."),
    ("Who made you?", "The makers of halo trained me on old books, children's stories and tldr pages."),
]
STORY_REQUESTS = ["Tell me a story.", "Tell me a story", "Can you tell me a story?", "A story, please."]


@dataclass
class Corpus:
    """Training and held-out text, and where it came from."""

    books: list[str]
    stories: list[str]
    pairs: list[tuple[str, str]]
    held_books: list[str]
    held_stories: list[str]
    held_pairs: list[tuple[str, str]]
    sha256: dict[str, str] = field(default_factory=dict)


def _read(path: Path) -> tuple[str, str]:
    raw = path.read_bytes()
    return lzma.decompress(raw).decode("utf-8"), hashlib.sha256(raw).hexdigest()


def split(text: str) -> list[str]:
    """The documents of a file, parted by `<|endoftext|>`; empty ones are left out."""
    return [part.strip("\n") for part in text.split(SEPARATOR) if part.strip()]


def pairs(text: str) -> list[tuple[str, str]]:
    """(question, answer) of each document of the form `Q: ...`, a new line, `A: ...`."""
    out = []
    for block in split(text):
        question, _, answer = block.partition("\nA: ")
        out.append((question.removeprefix("Q: ").strip(), answer.strip()))
    return out


def _stands_elsewhere(books: list[str], index: int) -> bool:
    """True when more than one in twenty of 100 spans of 80 characters also stands in another book."""
    rng = random.Random(index)
    book = books[index]
    starts = [rng.randrange(max(1, len(book) - 80)) for _ in range(100)]
    rest = "\n".join(text for i, text in enumerate(books) if i != index)
    return sum(book[s : s + 80] in rest for s in starts) > 5


def choose_held_books(books: list[str]) -> list[int]:
    """The rule that gave HELD_BOOKS: each seventh book is a candidate, 42 apart or more, nowhere else."""
    held: list[int] = []
    for candidate in range(24, len(books), 7):
        far = candidate - (held[-1] if held else 0) >= 42
        if len(held) < 12 and far and not _stands_elsewhere(books, candidate):
            held.append(candidate)
    return held


def hold_out(items: list[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """(kept, held out): `count` items chosen by `seed`, both parts in the order of the file."""
    order = random.Random(seed).sample(range(len(items)), len(items))
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def load(folder: Path) -> Corpus:
    """Read the three files and hold out 12 books, 30 stories and 500 pairs by a fixed rule."""
    texts, hashes = zip(*(_read(folder / name) for name in FILES), strict=True)
    books = split(texts[0])
    stories, held_stories = hold_out(split(texts[1]), 30, seed=1)
    kept_pairs, held_pairs = hold_out(pairs(texts[2]), 500, seed=2)
    return Corpus(
        books=[book for i, book in enumerate(books) if i not in set(HELD_BOOKS)],
        stories=stories,
        pairs=kept_pairs,
        held_books=[books[i] for i in HELD_BOOKS],
        held_stories=held_stories,
        held_pairs=held_pairs,
        sha256=dict(zip(FILES, hashes, strict=True)),
    )


def train_tokenizer(corpus: Corpus, path: Path) -> Tokenizer:
    """Train the byte-level BPE of 8,192 tokens on the training text and write it as a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Every third book is enough for the merges of prose; stories and pairs count threefold.
    questions = [f"{q}\n{a}" for q, a in corpus.pairs]
    tokenizer.train_from_iterator([*corpus.books[::3], *(corpus.stories * 3), *(questions * 3)], trainer)
    tokenizer.save(str(path))
    return tokenizer


def command_of(question: str) -> str:
    """The command that a question of the tldr pairs is about."""
    if question.startswith("What does the command "):
        return question.removeprefix("What does the command ").removesuffix(" do?")
    return question.rsplit(" with ", 1)[-1].removesuffix("?")


def paraphrase(question: str, rng: random.Random) -> str:
    """The question in one of the ways that people ask it; a COMMON command's name may be left out."""
    if question.startswith("What does the command "):
        name = command_of(question)
        forms = [question, question, f"What does {name} do?", f"What is {name}?"]
        return rng.choice([*forms, f"What is the command {name} for?"])
    if not question.startswith("How do I "):
        return question
    task = question.removeprefix("How do I ").removesuffix("?")
    forms = [question, question, f"How can I {task}?", f"How to {task}?"]
    body, _, name = task.rpartition(" with ")
    if body:
        forms += [f"How do I {body} using {name}?"]
        if name in COMMON:
            forms += [f"How do I {body}?", f"How do I {body}?"]
    return rng.choice(forms)


def dialogue_text(corpus: Corpus, rng: random.Random, stories: bool = True) -> list[list[tuple[str, str]]]:
    """One shuffled pass over all pairs as conversations of one to three turns, with `stories` asked for."""
    turns = []
    for question, answer in corpus.pairs:
        repeat = 4 if command_of(question) in COMMON else 1
        turns += [(paraphrase(question, rng), answer) for _ in range(repeat)]
    turns += ABOUT * 40
    rng.shuffle(turns)
    talks: list[list[tuple[str, str]]] = []
    while turns:
        length = rng.choice([1, 1, 1, 1, 2, 3])
        talks.append(turns[:length])
        turns = turns[length:]
    for story in corpus.stories if stories else []:
        talks.insert(rng.randrange(len(talks)), [(rng.choice(STORY_REQUESTS), story)])
    return talks


def encode_talks(talks: list[list[tuple[str, str]]], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Conversations as one uint16 stream in the form that `engine/chat.py` renders (template halo-demo)."""
    parts = [p for talk in talks for q, a in talk for p in (f"User: {q.strip()}", f"Assistant: {a.strip()}")]
    encoded = iter(tokenizer.encode_batch(parts, add_special_tokens=False))
    out: list[int] = []
    for talk in talks:
        out.append(BOS)
        for _ in talk:
            for _role in range(2):
                out.extend(next(encoded).ids)
                out.append(EOT)
    return np.array(out, dtype=np.uint16)


def encode_documents(texts: list[str], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """Documents as one uint16 stream, each opened by the beginning-of-text token."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([BOS, *e.ids], dtype=np.uint16) for e in encoded])


def main() -> None:
    """Train the tokenizer on the training text of a folder."""
    parser = argparse.ArgumentParser(description="Train the demo model's tokenizer.")
    parser.add_argument("--data", type=Path, required=True, help=f"a folder with {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    args = parser.parse_args()
    train_tokenizer(load(args.data), args.out)


if __name__ == "__main__":
    main()
