"""The Hugging Face Hub's API: which commit a revision is, and which of its files a model needs. No download.

Addresses and answers: huggingface_hub `hf_api.py` (`model_info`, `list_repo_tree`), `file_download.py`.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.fetch import Client, Refused, origin, shown

DEFAULT_ENDPOINT: Final = "https://huggingface.co"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
MAX_SMALL: Final = 64 << 20
MAX_INDEX: Final = 64 << 20
MAX_PAGES: Final = 100
_SMALL: Final = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_PAPERS: Final = re.compile(
    r"(LICEN[CS]E|NOTICE|README|USE_POLICY)[\w-]*(\.(md|txt|rst))?", re.IGNORECASE | re.ASCII
)
_SINGLE: Final = (".gguf", ".h1b")
_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_SHA256: Final = re.compile("[0-9a-f]{64}")
_CHECK: Final = "check the endpoint: is it a Hugging Face hub?"


@dataclass(frozen=True)
class RemoteFile:
    """One file at a commit: `size` in bytes; `sha256` where it is kept by LFS, else git's `blob` sha1."""

    path: str
    size: int
    blob: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """The plain name under which it is kept here."""
        return self.path.rpartition("/")[2]

    @property
    def pin(self) -> str:
        """The hash that its bytes must have, with its kind."""
        return f"sha256:{self.sha256}" if self.sha256 else f"git-blob-sha1:{self.blob}"


def split_repo(text: str) -> tuple[str, str]:
    """REPO[@REVISION] as (repository, revision); the revision is `main` unless it is said."""
    repo, _, revision = text.partition("@")
    bad = ".." in repo or repo.endswith((".git", ".ipynb"))
    if not _REPO.fullmatch(repo) or bad or ("@" in text and not revision):
        raise HaloError(
            f"{text!r} is no repository of a hub.",
            hint="it looks like microsoft/bitnet-b1.58-2B-4T, with @REVISION behind it if it must be one",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    if len(revision) > 200 or not all(c.isprintable() for c in revision):
        raise HaloError(
            f"{revision[:40]!r} is no revision.", hint="name a branch, a tag or a commit", exit_code=3
        )
    return repo, revision or "main"


def endpoint_of(given: str | None, environ: Mapping[str, str]) -> str:
    """The hub's address: `given`, HF_ENDPOINT, or the default; checked."""
    endpoint = (given or environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    origin(endpoint)
    return endpoint


def read_token(given: Path | None, environ: Mapping[str, str]) -> str:
    """The token of HF_TOKEN, else of a file: `given`, HF_TOKEN_PATH, $HF_HOME/token, the hub's own cache."""
    if given is None and environ.get("HF_TOKEN"):
        return _sound_token(environ["HF_TOKEN"], "HF_TOKEN")
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    path = given or Path(environ.get("HF_TOKEN_PATH") or f"{home}/token")
    try:
        with path.open("rb") as stream:
            return _sound_token(stream.read(4097).decode("utf-8", "replace"), str(path))
    except OSError as error:
        if given is None and "HF_TOKEN_PATH" not in environ:
            return ""  # nobody asked for a token
        raise HaloError(
            f"The token file {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error


def _sound_token(text: str, where: str) -> str:
    token = text.strip()
    if not re.fullmatch("[!-~]{0,4096}", token):  # it goes into a header: no line end may be in it
        raise HaloError(f"{where} holds no token: a token is one word.", hint="write the token alone into it")
    return token


def resolve(client: Client, repo: str, revision: str) -> str:
    """The commit (40 hex digits) that `revision` is now. Raises HaloError with what a person can do."""
    quoted = urllib.parse.quote(revision, safe="")
    data = _asked(client, f"{client.endpoint}/api/models/{repo}/revision/{quoted}", repo, revision)[0]
    commit = data.get("sha") if isinstance(data, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise HaloError(f"{shown(client.endpoint)} did not say which commit {revision} is.", hint=_CHECK)
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise HaloError(f"{shown(client.endpoint)} gave commit {commit} for {revision}.", hint=_CHECK)
    return commit


def listing(client: Client, repo: str, commit: str) -> list[RemoteFile]:
    """Every file of the repository at `commit`, checked: names that stay inside, sizes, hashes."""
    url = f"{client.endpoint}/api/models/{repo}/tree/{commit}?recursive=true"
    found: dict[str, RemoteFile] = {}
    for _ in range(MAX_PAGES):
        data, following = _asked(client, url, repo, commit)
        if not isinstance(data, list):
            raise HaloError(f"{shown(url)} is no list of files.", hint=_CHECK)
        for entry in data:
            if not isinstance(entry, dict) or entry.get("type") != "directory":
                file = _file(entry)
                if file.path in found:
                    raise HaloError(f"The hub lists {file.path} twice.", hint=_CHECK)
                found[file.path] = file
        if not following:
            return list(found.values())
        try:
            url = urllib.parse.urljoin(url, following)
        except ValueError:  # a bracket that is never closed
            url = ""
        if origin(url) != origin(client.endpoint):
            raise HaloError("The hub's list of files goes on at another host.", hint=_CHECK)
    raise HaloError(f"The hub's list of files has more than {MAX_PAGES} pages.", hint=_CHECK)


def _asked(client: Client, url: str, repo: str, revision: str) -> tuple[Any, str]:
    """A JSON answer and the address of the next page; a refusal becomes what a person can do about it."""
    try:
        data, response = client.json(url)
    except Refused as error:
        raise refusal(error, repo, revision) from error
    match = re.search(r'<([^<>]{1,2000})>\s*;\s*rel="?next"?', response.header("Link")[:8192])
    return data, match[1] if match else ""


def refusal(error: Refused, repo: str, revision: str) -> HaloError:
    """What an answer of 401, 403, 404 and their like means for the person who asked for `repo`."""
    if error.code == "RevisionNotFound":
        return HaloError(f"{repo} has no revision {revision}.", hint="name a branch, a tag or a commit")
    if error.code == "GatedRepo" or error.status == 403:
        return HaloError(
            f"{repo} is given out only to those who accepted its terms ({error.status}).",
            hint="accept them on its page, put a token of yours into HF_TOKEN, and run the command again",
        )
    if error.status == 401:
        return HaloError(
            f"{repo} does not exist, or is private (401).",
            hint="check the name; for a private one put a token that may read it into HF_TOKEN",
        )
    if error.status == 404:
        return HaloError(f"{repo} at {revision} is not there (404).", hint="check the name and the revision")
    return HaloError(error.message, hint=error.hint)


def _file(entry: object) -> RemoteFile:
    """One entry of the list. The names and numbers come from outside and are believed in nothing."""
    if not isinstance(entry, dict):
        raise HaloError("The hub's list of files has an entry that is no file.", hint=_CHECK)
    path, size, blob, lfs = (entry.get(key) for key in ("path", "size", "oid", "lfs"))
    if not isinstance(path, str) or not _stays_inside(path):
        raise HaloError(f"The hub lists a file with the name {str(path)[:80]!r}.", hint=_CHECK)
    sha256 = ""
    if lfs is not None:
        sha256 = str(lfs.get("oid") if isinstance(lfs, dict) else "").removeprefix("sha256:")
        size = lfs.get("size", size) if isinstance(lfs, dict) else None
        if not _SHA256.fullmatch(sha256):
            raise HaloError(f"The hub does not say which sha256 {path} has.", hint=_CHECK)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 50:
        raise HaloError(f"The hub does not say how long {path} is.", hint=_CHECK)
    if not isinstance(blob, str) or not _COMMIT.fullmatch(blob):
        raise HaloError(f"The hub does not say which hash {path} has.", hint=_CHECK)
    return RemoteFile(path, size, blob, sha256)


def _stays_inside(path: str) -> bool:
    parts = path.split("/")
    printable = path.isprintable() and "\\" not in path and len(path.encode("utf-8", "replace")) < 1024
    return printable and all(part not in ("", ".", "..") and len(part.encode()) < 250 for part in parts)


def choose(files: list[RemoteFile], repo: str, single: str | None) -> tuple[list[RemoteFile], RemoteFile]:
    """(small files to fetch first, the weights or their index). With `single`, that one file is the model."""
    root = {file.path: file for file in files if "/" not in file.path}
    papers = [file for name, file in root.items() if _PAPERS.fullmatch(name)]
    if single is not None:
        named = next((file for file in files if file.path == single), None)
        if named is None or not single.endswith(_SINGLE):
            raise HaloError(f"{repo} has no file {single!r} that holds a model.", hint=_others(files))
        beside = [root[name] for name in ("tokenizer.htok",) if name in root and single.endswith(".h1b")]
        return _all_small(papers + beside), named
    weights = root.get(WEIGHTS) or root.get(INDEX)
    if weights is None or CONFIG not in root:
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in root)
        why = ": its weights are pickled, which can run any program" if pickled else ""
        raise HaloError(f"{repo} has no {CONFIG} with {WEIGHTS}{why}.", hint=_others(files))
    small = [root[name] for name in _SMALL if name in root] + papers
    return _all_small(small), weights


def _all_small(files: list[RemoteFile]) -> list[RemoteFile]:
    for file in files:
        if file.size > MAX_SMALL:
            raise HaloError(f"{file.path} has {file.size} bytes, which no such file has.", hint=_CHECK)
    return files


def _others(files: list[RemoteFile]) -> str:
    models = sorted(file.path for file in files if file.path.endswith(_SINGLE))
    if not models:
        return "name a repository that has a ternary model as safetensors, or as one .gguf file"
    more = f" and {len(models) - 5} more" if len(models) > 5 else ""
    return f"with --file FILE you can have: {', '.join(models[:5])}{more}"


def shards(index: Path, files: list[RemoteFile]) -> list[RemoteFile]:
    """The files that a fetched model.safetensors.index.json names, all of which the repository must have."""
    root = {file.path: file for file in files if "/" not in file.path}
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(placed.values()))
        found = [root[name] for name in names if name.endswith(".safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HaloError(f"{INDEX} does not name files that the repository has.", hint=_CHECK) from error
    if not found or len(found) != len(names):
        raise HaloError(f"{INDEX} does not name files that the repository has.", hint=_CHECK)
    return found


def file_url(endpoint: str, repo: str, commit: str, path: str) -> str:
    """Where the bytes of `path` at `commit` are."""
    return f"{endpoint}/{repo}/resolve/{commit}/{urllib.parse.quote(path)}"
