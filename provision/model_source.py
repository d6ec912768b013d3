"""Where the bundled model is in a source tree, and the variable that puts another in its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

DEMO_MODEL: Final = "engine/models/demo"


def model_source(source: Path) -> Path:
    """The directory of the bundled model; HALO_DEMO_MODEL_DIR names another, as tests do."""
    override = os.environ.get("HALO_DEMO_MODEL_DIR", "")
    return Path(override) if override else source / DEMO_MODEL
