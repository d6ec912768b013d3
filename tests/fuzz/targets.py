"""All fuzz targets by name: one for each parser of a file, of a request, of an answer."""

from __future__ import annotations

from tests.fuzz import (
    api_targets,
    model_targets,
    other_api_targets,
    server_targets,
    text_targets,
    wire_targets,
)
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for group in (model_targets, text_targets, wire_targets, api_targets, other_api_targets, server_targets)
    for target in group.TARGETS
}
