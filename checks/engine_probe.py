"""Decode the golden prompt with the engine itself, without a server: a child process of the doctor.

Run by the generation's own Python as `python -m checks.engine_probe MODEL_DIR`; one JSON line out. The doctor
never imports it, for it needs NumPy and the native library.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError

FACTS: Final = ("backend", "backend_reason", "device")  # those of /health


def decode(model_dir: Path) -> dict[str, Any]:
    """The greedy ids for the first golden prompt of the model's own description, and what decoded them."""
    from engine.generate import Engine
    from engine.sampling import SamplingParams

    golden = json.loads((model_dir / "model.json").read_text())["golden"][0]
    params = SamplingParams(max_tokens=len(golden["ids"]), temperature=0.0)
    with Engine.open(model_dir) as engine:
        ids = [step.token_id for step in engine.generate(golden["prompt_ids"], params)]
        return {"ids": ids, **{key: engine.facts.get(key) for key in FACTS}}


def main(argv: list[str]) -> int:
    """`MODEL_DIR`; a HaloError is JSON too, anything else is a traceback that the doctor quotes."""
    try:
        print(json.dumps(decode(Path(argv[-1]))))
    except HaloError as error:
        print(json.dumps({"error": error.message}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
