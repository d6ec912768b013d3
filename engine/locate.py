"""Where the running generation, its model and its identity are; it opens neither model nor library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError

MODEL_FILES: Final = ("model.halo", "tokenizer.htok", "model.json")
OTHER_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model")
SOURCE_GENERATION: Final = "source"
CHAT_TEMPLATES: Final = ("bitnet", "halo-demo", "jinja")


@dataclass(frozen=True)
class Home:
    """One resolved place to run from: a generation directory (None in a source checkout) and a model."""

    generation_dir: Path | None
    model_dir: Path
    generation: str
    version: str


@dataclass(frozen=True)
class ModelCard:
    """What model.json says of a model: its name, its chat template and the context it was trained for."""

    name: str
    chat_template: str
    context: int


def locate(model: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Home:
    """Resolve generation and model directory; raises HaloError where there is no usable model.

    The model is, first hit wins: `model` (the --model flag), HALO_MODEL, <generation>/models/default.
    The generation is HALO_GENERATION_DIR, which the launcher of a generation sets.
    """
    env = os.environ if environ is None else environ
    generation_dir = Path(env["HALO_GENERATION_DIR"]) if env.get("HALO_GENERATION_DIR") else None
    manifest = _read_manifest(generation_dir)
    return Home(
        generation_dir=generation_dir,
        model_dir=_model_dir(model, env, generation_dir),
        generation=_shown(manifest.get("id", SOURCE_GENERATION)),
        version=_shown(manifest.get("version", "")) or _source_version(),
    )


def read_card(model_dir: Path) -> ModelCard:
    """Read and check model.json of a model directory."""
    path = model_dir / "model.json"
    data = _read_object(path, "the model's description")
    name, template, context = data.get("name"), data.get("chat_template"), data.get("context")
    if not isinstance(name, str) or not name or name.encode("utf-8", "ignore").decode() != name:
        raise _bad_card(path, "it has no name")
    if template not in CHAT_TEMPLATES:
        raise _bad_card(path, f"its chat_template is {template!r}, known are {', '.join(CHAT_TEMPLATES)}")
    if not isinstance(context, int) or isinstance(context, bool) or context < 2:
        raise _bad_card(path, f"its context is {context!r}, not a number of tokens")
    return ModelCard(name=name, chat_template=str(template), context=context)


def _model_dir(model: str | Path | None, env: Mapping[str, str], generation_dir: Path | None) -> Path:
    if model is not None:
        return _usable(Path(model), "given with --model")
    if env.get("HALO_MODEL"):
        return _usable(Path(env["HALO_MODEL"]), "named by HALO_MODEL")
    if generation_dir is not None:
        return _usable(generation_dir / "models" / "default", "of this generation")
    raise HaloError(
        "No model: this is no installed generation, and neither --model nor HALO_MODEL names one.",
        hint="run `python3 install.py`, or in a source checkout set HALO_MODEL and HALO_LIB_DIR.",
    )


def _usable(path: Path, origin: str) -> Path:
    try:
        missing = [name for name in MODEL_FILES if not (path / name).is_file()]
        if any((path / name).is_file() for name in OTHER_TOKENIZERS):
            missing = [name for name in missing if name != "tokenizer.htok"]
    except OSError as error:
        raise HaloError(
            f"The model directory {path} ({origin}) cannot be read: {error.strerror}.",
            hint=f"look at its owner and mode: ls -ld {path}",
        ) from error
    if len(missing) == len(MODEL_FILES):
        raise HaloError(
            f"There is no model in {path} ({origin}).",
            hint="run `halo install` to lay one down, or give another directory with --model.",
        )
    if missing:
        raise HaloError(
            f"The model in {path} ({origin}) lacks {', '.join(missing)}.",
            hint="run `halo install` again for the bundled model; import or pull any other one again.",
        )
    return path


def _shown(value: object) -> str:
    """As text that can be sent: JSON may hold half a surrogate pair, and UTF-8 does not."""
    return str(value).encode("utf-8", "replace").decode()


def _read_manifest(generation_dir: Path | None) -> dict[str, Any]:
    if generation_dir is None:
        return {}
    if not (generation_dir / "manifest.json").exists():
        raise HaloError(
            f"{generation_dir} (HALO_GENERATION_DIR) is no complete generation: it has no manifest.json.",
            hint="run `halo install` again, or unset HALO_GENERATION_DIR.",
        )
    return _read_object(generation_dir / "manifest.json", "the generation's manifest")


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise HaloError(
            f"Cannot read {path}, {what}: {error.strerror}.", hint=f"look at it: ls -l {path}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise HaloError(
            f"{path}, {what}, is not valid JSON.", hint="run `halo install` again: it rewrites the file."
        ) from error
    if not isinstance(data, dict):
        raise HaloError(f"{path}, {what}, is not a JSON object.", hint="run `halo install` again.")
    return data


def _bad_card(path: Path, why: str) -> HaloError:
    return HaloError(f"{path} does not describe a model: {why}.", hint="run `halo install` again.")


def _source_version() -> str:
    """The version that the source beside this room says it is."""
    import tomllib

    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
        return str(project["project"]["version"])
    except (OSError, ValueError, KeyError):
        return "unknown"
