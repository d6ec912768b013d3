"""Run in a generation's own Python: prepare the model, and decode the golden prompt without a server.

A child process of the installer (`python -m provision.prove MODEL_DIR`), one JSON object out. It is the one
place of provision that imports NumPy and the engine; the installer itself never does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from engine.errors import HaloError


def ensure_prepared(model_dir: Path) -> bool:
    """Make model.halo if it is not there or not whole; returns whether it was made."""
    from engine.formats.h1b import read_h1b
    from engine.formats.prepared import prepare, verify_prepared
    from engine.formats.store import PREPARED, SEAL, seal

    prepared = model_dir / PREPARED
    if prepared.is_file():
        try:
            verify_prepared(prepared)
        except HaloError:
            if not (model_dir / "model.h1b").is_file():
                raise  # it came prepared: nothing here to make it from
            prepared.unlink()
        else:
            if not (model_dir / SEAL).is_file():
                seal(model_dir)
            return False
    prepare(read_h1b(model_dir / "model.h1b"), prepared)
    seal(model_dir)
    return True


def decode(model_dir: Path) -> dict[str, Any]:
    """Decode the first golden prompt greedily with the native engine: ids and text."""
    from engine.generate import Engine
    from engine.sampling import SamplingParams

    golden = json.loads((model_dir / "model.json").read_text())["golden"][0]
    params = SamplingParams(max_tokens=len(golden["ids"]), temperature=0.0)
    with Engine.open(model_dir) as engine:
        steps = list(engine.generate(golden["prompt_ids"], params))
    return {"ids": [step.token_id for step in steps], "text": "".join(step.text for step in steps)}


def main(argv: list[str]) -> int:
    """`[--prepare-only] MODEL_DIR`; errors are JSON too."""
    model_dir = Path(argv[-1])
    try:
        report: dict[str, Any] = {"prepared": ensure_prepared(model_dir)}
        if "--prepare-only" not in argv:
            report |= decode(model_dir)
    except HaloError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
