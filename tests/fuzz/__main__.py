"""python -m tests.fuzz TARGET: fuzz one parser with coverage (Atheris), for minutes of CPU time."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

_INSTRUMENTED = ["engine", "checks", "provision", "install", "jinja2", "tarfile", "tomllib", "http.client"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="a name of tests/fuzz/targets.py, or `list`")
    parser.add_argument("--minutes", type=float, default=20.0, help="CPU time of all runs with this --work")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "halo-fuzz",
        help="corpora, counts and faults",
    )
    parser.add_argument("--length", type=int, default=65536, help="the longest input")
    parser.add_argument("--keep", action="store_true", help="minimise --work's corpus into tests/fuzz/corpus")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 1 where there was a fault."""
    given = _arguments()
    if given.keep or given.target == "list":
        return _plain(given)
    try:
        import atheris
    except ImportError:
        print(
            f"error: Atheris is not installed.\nhint: {sys.executable} -m pip install atheris",
            file=sys.stderr,
        )
        return 3

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.corpus import read_corpus
    from tests.fuzz.guard import Guard
    from tests.fuzz.target import hostile

    target = TARGETS[given.target]
    corpus = given.work / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*target.seeds(), *hostile(target), *read_corpus(target.name)]):
        (corpus / f"seed-{number:04}").write_bytes(data)
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix=f"halo-fuzz-{target.name}-", dir=shm))
    guard = Guard(
        target, folder / "place", given.work, f"atheris {getattr(atheris, '__version__', '')}".strip()
    )
    guard.folder.mkdir()
    limit = 60 * given.minutes

    def one(data: bytes) -> None:
        guard.run(data)
        if guard.cpu > limit:
            guard.save()
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{target.name}: done, {guard.state}", flush=True)
            os._exit(bool(guard.state["faults"]))

    arguments = [
        sys.argv[0], str(corpus), f"-max_len={given.length}", "-timeout=900", "-rss_limit_mb=4096",
        f"-artifact_prefix={given.work}/faults/{target.name}-abort-", "-print_final_stats=1",
        "-reload=0", "-report_slow_units=900",
        f"-seed={random.randrange(1, 1 << 31)}",
    ]  # fmt: skip
    (given.work / "faults").mkdir(exist_ok=True)
    if target.words:
        arguments.append(f"-dict={_dictionary(folder, target.words)}")
    atheris.Setup(arguments, one)
    atheris.Fuzz()
    return 0


def _dictionary(folder: Path, words: tuple[bytes, ...]) -> Path:
    path = folder / "words"
    lines = ('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in words)
    path.write_text("\n".join(lines) + "\n")
    return path


def _plain(given: argparse.Namespace) -> int:
    from tests.fuzz.corpus import keep
    from tests.fuzz.targets import TARGETS

    names = list(TARGETS) if given.target in ("list", "all") else [given.target]
    for name in names:
        if given.target == "list":
            print(name)
        else:
            print(f"{name}: {keep(TARGETS[name], given.work / 'corpus' / name)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
