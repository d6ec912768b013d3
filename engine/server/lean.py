"""Import uvicorn's server without its command line and logging's configuration, which a service never uses.

They are a third of what uvicorn's import costs, and that is a sixth of a cold start (docs/benchmarks.md).
`import uvicorn` alone would bring click; a module in its place for the while of that import keeps it out.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

_UNUSED: Final = {"uvicorn.main": ("main", "run", "Server"), "logging.config": ()}


@contextmanager
def without_command_line() -> Iterator[None]:
    """While inside, `import uvicorn` finds empty modules for what is not used; afterwards they are gone."""
    absent = {name: names for name, names in _UNUSED.items() if name not in sys.modules}
    for name, names in absent.items():
        sys.modules[name] = stand_in = ModuleType(name)
        for each in names:
            setattr(stand_in, each, None)
    bare: Any = logging
    if "logging.config" in absent:
        bare.config = sys.modules["logging.config"]  # as the import itself would have bound it
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        if "logging.config" in absent:
            del bare.config
