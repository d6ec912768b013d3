#!/usr/bin/env python3
"""Find a Python and a source, and hand over to `halo install`. Standard library only.

It must parse on Python 3.6, so that an old Python says a sentence and not a SyntaxError. It runs as a file in
a clone, piped with the current directory in a clone, and from a bundle: python3 - --bundle FILE < install.py
"""
# os.path and % are meant: this file has to parse, and say its sentence, on Python 3.6.
# ruff: noqa: B904, PTH100, PTH101, PTH103, PTH109, PTH113, PTH118, PTH120, PTH123, RUF005, UP031

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile

OLDEST = (3, 11)
NEWEST = (3, 14)
CHUNK = 1 << 20
MANIFEST_BYTES = 16 << 20  # at most; a member may claim more than there is memory


class Refusal(Exception):
    """A sentence and a hint for the person; exit code 1."""

    def __init__(self, message: str, hint: str) -> None:
        Exception.__init__(self, message)
        self.message = message
        self.hint = hint


def python_command() -> str:
    """What installs a newer Python on this distribution."""
    for program, command in (
        ("apt-get", "apt-get install -y python3 python3-venv"),
        ("dnf", "dnf install -y python3.12"),
        ("pacman", "pacman -S --needed python"),
        ("zypper", "zypper install python312"),
        ("apk", "apk add python3"),
    ):
        if shutil.which(program):
            return ("" if os.geteuid() == 0 else "sudo ") + command
    return "install Python 3.11 or newer with your distribution's package manager"


def other_python() -> str:
    """The newest python3.1x on PATH that halo runs on, or nothing."""
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)
        if found is None:
            continue
        probe = "import sys; sys.exit(sys.version_info[:2] != (3, %d))" % minor
        if (
            subprocess.call([found, "-I", "-c", probe], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            == 0
        ):
            return found
    return ""


def require_python(argv: list) -> None:
    """Go on, or start again under a Python that will do, or refuse."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    here = ".".join(str(part) for part in sys.version_info[:2])
    found = other_python()
    if not found or os.environ.get("HALO_REEXEC"):
        raise Refusal("halo needs Python 3.11 to 3.14, and this is %s." % here, python_command())
    script = script_path()
    if not script:
        raise Refusal("This is Python %s, and halo needs 3.11 to 3.14." % here, "pipe it into %s" % found)
    os.environ["HALO_REEXEC"] = "1"
    os.execv(found, [found, script] + argv)  # noqa: S606


def script_path() -> str:
    """This file's path, or nothing when it came through a pipe."""
    path = globals().get("__file__", "")
    return os.path.abspath(path) if path and os.path.isfile(path) else ""


def is_source(directory: str) -> bool:
    """Whether a directory is halo's source."""
    return all(
        os.path.isfile(os.path.join(directory, name)) for name in ("provision/cli.py", "engine/errors.py")
    )


def find_source() -> str:
    """The source beside this file, or in the current directory when this came through a pipe."""
    script = script_path()
    for directory in ([os.path.dirname(script)] if script else []) + [os.getcwd()]:
        if is_source(directory):
            return directory
    raise Refusal(
        "There is no halo source here.",
        "run it in a clone (cd halo; python3 install.py), or give it a bundle: --bundle FILE",
    )


def bundle_argument(argv: list) -> tuple:
    """(bundle or nothing, the other arguments)."""
    rest, bundle, words = [], "", list(argv)
    while words:
        word = words.pop(0)
        if word == "--bundle" and words:
            bundle = words.pop(0)
        elif word.startswith("--bundle="):
            bundle = word.partition("=")[2]
        else:
            rest.append(word)
    return bundle, rest


def read_manifest(tar: tarfile.TarFile, bundle: str) -> dict:
    """bundle.json, which is the tar's first member: path -> sha256."""
    member = tar.next()
    first = member is not None and member.isfile() and member.name == "bundle.json"
    sound = first and not member.issparse() and member.size <= MANIFEST_BYTES
    stream = tar.extractfile(member) if sound else None
    try:
        manifest = json.loads(stream.read().decode()) if stream is not None else {}
        files = manifest["files"]
        if manifest["schema"] != 1 or not all(isinstance(value, str) for value in files.values()):
            raise ValueError("schema")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise Refusal("%s is not a halo bundle." % bundle, "make one with: halo bundle -o FILE")
    return dict(files)


def safe_target(directory: str, member: tarfile.TarInfo, bundle: str) -> str:
    """Where a member goes; one that is no plain file inside the directory is refused."""
    parts = member.name.split("/")
    plain = member.isfile() and not member.issparse()  # whose zeros no byte of the bundle pays for
    if not plain or member.name.startswith("/") or ".." in parts or "" in parts or "." in parts:
        raise Refusal(
            "%s has a member that is not allowed: %s." % (bundle, member.name), "get the bundle anew"
        )
    return os.path.join(directory, *parts)


def write_member(stream: object, target: str, mode: int) -> str:
    """Write a member's bytes, and return the sha256 of the very bytes that were written."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        while True:
            chunk = stream.read(CHUNK)
            if not chunk:
                break
            digest.update(chunk)
            out.write(chunk)
    os.chmod(target, 0o755 if mode & 0o100 else 0o644)
    return digest.hexdigest()


def unpack(bundle: str, directory: str) -> None:
    """Every member into `directory`, its hash checked; nothing of it has run by then."""
    try:
        with tarfile.open(bundle, "r:") as tar:
            expected = read_manifest(tar, bundle)
            for member in tar:
                if member.name == "bundle.json":
                    continue
                target = safe_target(directory, member, bundle)
                wanted = expected.pop(member.name, "")
                if write_member(tar.extractfile(member), target, member.mode) != wanted:
                    raise Refusal(
                        "%s is damaged: %s does not have the hash that its manifest names."
                        % (bundle, member.name),
                        "get the bundle anew; nothing was changed",
                    )
    except (tarfile.TarError, EOFError, IndexError):  # the last is tarfile's own, of a torn sparse header
        raise Refusal(
            "%s is not a halo bundle, or is cut short." % bundle, "make one with: halo bundle -o FILE"
        )
    if expected:
        raise Refusal(
            "%s is incomplete: %s is missing." % (bundle, sorted(expected)[0]), "get the bundle anew"
        )
    with open(os.path.join(directory, "bundle.json"), "w") as out:
        out.write("{}\n")


def hand_over(source: str, argv: list) -> int:
    """`halo install` from this source, in this process."""
    sys.dont_write_bytecode = True  # a clone stays as clean as it was
    sys.path.insert(0, source)
    from provision.cli import main as halo

    return int(halo(["install"] + argv))


def main(argv: list) -> int:
    """Returns the exit code."""
    try:
        require_python(argv)
        bundle, rest = bundle_argument(argv)
        if not bundle:
            return hand_over(find_source(), rest)
        if not os.path.isfile(bundle):
            raise Refusal(
                "There is no bundle %s." % bundle, "ls -l %s; make one with: halo bundle -o FILE" % bundle
            )
        # SIGTERM unwinds, so that the unpacked bundle goes too.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        directory = tempfile.mkdtemp(prefix="halo-bundle-")
        try:
            unpack(bundle, directory)
            return hand_over(directory, rest)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except Refusal as refusal:
        sys.stderr.write("error: %s\nhint: %s\n" % (refusal.message, refusal.hint))
        return 1
    except OSError as error:
        sys.stderr.write(
            "error: %s\nhint: df -h %s; or set TMPDIR to a place with room\n" % (error, tempfile.gettempdir())
        )
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
