"""Which backend library decodes here, how one is loaded and what it says. Not its models: backend.py.

HALO_BACKEND names it: auto (the GPU's library where it is there and finds its GPU, else the CPU's), cpu,
hip, cuda, or sim (the GPU's kernels, simulated on the CPU). HALO_LIB_DIR or HALO_GENERATION_DIR says where
the libraries lie.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

ABI_VERSION: Final = 4
BACKENDS: Final = ("cpu", "hip", "cuda", "sim")
GPU_OF_AUTO: Final = "hip"  # the backend that is the product's; the others are asked for by name
ON_THE_CPU: Final = "on the CPU meanwhile: HALO_BACKEND=cpu"
LOST: Final = 9  # HALO_LOST of halo.h
_REBUILD: Final = "build it again: halo install"
_HINTS: Final = {
    2: "check the path and its permissions",
    3: "prepare the model again: halo install",
    4: "unset HALO_CPU_PATH, or name a path that this machine has",
    5: "use fewer slots or a shorter context",
    7: "check the model: halo doctor",
}
_GPU_HINTS: Final = _HINTS | {
    4: f"halo doctor says what the GPU or its driver lacks; {ON_THE_CPU}",
    5: f"use fewer slots or a shorter context; {ON_THE_CPU}",
    8: f"halo doctor; {ON_THE_CPU}",
    LOST: f"start halo again; if it stays lost, read dmesg and ask halo doctor; {ON_THE_CPU}",
}
_OPAQUE = ctypes.c_void_p
_SIZE = ctypes.POINTER(ctypes.c_size_t)


class RawConfig(ctypes.Structure):
    """halo_config of halo.h."""

    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size",
                "max_seq_len", "tie_embeddings", "activation", "sub_norms", "head_dim",
            )
        ],
        ("rope_theta", ctypes.c_float),
        ("rms_norm_eps", ctypes.c_float),
    ]  # fmt: skip


_I32 = ctypes.c_int32
_SIGNATURES: Final[dict[str, list[Any]]] = {
    "halo_device_facts": [ctypes.c_char_p, ctypes.c_size_t, _SIZE],
    "halo_model_open": [ctypes.c_char_p, ctypes.POINTER(_OPAQUE)],
    "halo_model_config": [_OPAQUE, ctypes.POINTER(RawConfig)],
    "halo_session_create": [_OPAQUE, _I32, _I32, _I32, *[ctypes.c_char_p] * 2, ctypes.POINTER(_OPAQUE)],
    "halo_session_facts": [_OPAQUE, ctypes.c_char_p, ctypes.c_size_t, _SIZE],
    "halo_session_run": [
        _OPAQUE, _I32, _OPAQUE, _OPAQUE, _OPAQUE, _OPAQUE, ctypes.c_uint32, _OPAQUE, ctypes.c_size_t, _OPAQUE,
        ctypes.c_size_t,
    ],
    "halo_session_draw": [
        _OPAQUE, _I32, *[_OPAQUE] * 5, ctypes.c_float, ctypes.c_size_t, ctypes.c_size_t, *[_OPAQUE] * 4,
    ],
    "halo_session_copy": [_OPAQUE, _I32, _I32, _I32],
    "halo_session_logits": [_OPAQUE, _I32, _OPAQUE, ctypes.c_size_t],
    "halo_ternary_sums": [ctypes.c_char_p, _OPAQUE, _I32, _I32, _OPAQUE, _I32, _OPAQUE],
}  # fmt: skip


class DeviceLost(HaloError):
    """The GPU stopped answering: nothing that this process holds of it is of any more use."""


@dataclass(frozen=True)
class Backend:
    """A loaded library. `reason`: why it is not a GPU's, or who asked for it; "" where nobody wonders."""

    name: str
    library: ctypes.CDLL
    reason: str = ""

    def facts(self) -> dict[str, Any]:
        """What the library found on this machine: backend, abi, isa; and the reason."""
        return {**read_facts(self.library, "halo_device_facts"), "backend_reason": self.reason}


def choose_backend(environ: Mapping[str, str] = os.environ) -> Backend:
    """The backend that HALO_BACKEND names, or the best one here. HaloError where it cannot be had."""
    wanted = environ.get("HALO_BACKEND") or "auto"
    if wanted == "auto":
        return _best()
    if wanted not in BACKENDS:
        raise HaloError(
            f"HALO_BACKEND is {wanted[:40]!r}, and there is no such backend.",
            hint=f"unset it, or choose one of auto, {', '.join(BACKENDS)}",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    return _working(wanted, f"HALO_BACKEND={wanted}")


def open_backend(path: Path) -> Backend:
    """The backend of the library at `path`, whatever HALO_BACKEND says."""
    library = load_library(path)
    return Backend(name_of(library), library)


def _best() -> Backend:
    """The GPU's where its library is there and finds its device; else the CPU's, with the reason why."""
    folder, file = library_folder(), file_name(GPU_OF_AUTO)
    reason = f"there is no {file} here"
    if folder is not None and (folder / file).is_file():
        try:
            return _working(GPU_OF_AUTO, "")
        except HaloError as error:
            reason = error.message
    return Backend("cpu", load_library(find_library("cpu")), reason)


def _working(name: str, reason: str) -> Backend:
    """A backend whose device answers; a model of gigabytes is not read for one that does not."""
    library = load_library(find_library(name))
    try:
        read_facts(library, "halo_device_facts")
    except HaloError as error:
        error.exit_code = EXIT_COULD_NOT_RUN
        raise
    return Backend(name, library, reason)


def file_name(name: str) -> str:
    """The file of a backend's library."""
    return f"libhalo_{name}.so"


def library_folder() -> Path | None:
    """Where the libraries lie; None in a source tree without HALO_LIB_DIR."""
    folder, generation = os.environ.get("HALO_LIB_DIR"), os.environ.get("HALO_GENERATION_DIR")
    if folder:
        return Path(folder)
    return Path(generation) / "lib" if generation else None


def find_library(name: str = "cpu") -> Path:
    """The library `libhalo_<name>.so` of HALO_LIB_DIR, else of the generation. HaloError if there is none."""
    folder = library_folder()
    if folder is None:
        raise HaloError(
            f"The native library {file_name(name)} cannot be found: this is not an installed halo.",
            hint="run halo install, or set HALO_LIB_DIR to a build of engine/native",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    path = folder / file_name(name)
    if not path.is_file():
        hint = "halo install" if name in ("cpu", GPU_OF_AUTO) else f"build it, or {ON_THE_CPU}"
        if name == GPU_OF_AUTO:
            hint += f" --profile strix-halo; {ON_THE_CPU}"
        raise HaloError(f"The native library {path} is missing.", hint=hint, exit_code=EXIT_COULD_NOT_RUN)
    return path


def load_library(path: Path) -> ctypes.CDLL:
    """Load a backend library and check its ABI version. Raises HaloError if it cannot be used here."""
    try:
        library = ctypes.CDLL(str(path))
        library.halo_last_error.restype = ctypes.c_char_p
        library.halo_abi_version.restype = ctypes.c_uint32
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = ctypes.c_int
        for name in ("halo_model_close", "halo_session_close"):
            getattr(library, name).argtypes = [_OPAQUE]
            getattr(library, name).restype = None
        version = library.halo_abi_version()
    except (OSError, AttributeError) as error:
        raise HaloError(
            f"The native library {path} cannot be loaded: {error}.",
            hint=_REBUILD,
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
    if version != ABI_VERSION:
        raise HaloError(
            f"The native library {path} speaks ABI {version}, and this halo speaks {ABI_VERSION}.",
            hint=_REBUILD,
            exit_code=EXIT_COULD_NOT_RUN,
        )
    return library


def name_of(library: ctypes.CDLL) -> str:
    """The backend whose library this is, by its file's name."""
    return Path(library._name).stem.removeprefix("libhalo_")


def check(library: ctypes.CDLL, status: int) -> None:
    """Raise HaloError with the library's own sentence unless `status` is HALO_OK."""
    if status:
        name = name_of(library)
        text = (library.halo_last_error() or b"").decode("utf-8", "replace") or f"status {status}"
        gpu = name in BACKENDS and name != "cpu"
        hint = (_GPU_HINTS if gpu else _HINTS).get(status, "")
        kind = DeviceLost if status == LOST else HaloError
        raise kind(f"The native engine{f' ({name})' if gpu else ''} refused: {text}.", hint=hint)


def read_facts(library: ctypes.CDLL, function: str, *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """The JSON object that one of the library's fact functions writes."""
    buffer, needed = ctypes.create_string_buffer(4096), ctypes.c_size_t()
    check(library, getattr(library, function)(*arguments, buffer, len(buffer), ctypes.byref(needed)))
    facts: dict[str, Any] = json.loads(buffer.value)
    return facts


def device_facts(path: Path | None = None) -> dict[str, Any]:
    """What a library found on this machine: backend, abi, isa (its best path), paths, cpus."""
    return read_facts(load_library(path or find_library()), "halo_device_facts")
