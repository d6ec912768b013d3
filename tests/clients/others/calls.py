"""Run every check of a script against a server; the scripts run under a Python with clients of their own.

    python SCRIPT URL MODEL

A check is a function whose name begins with check_, of (url, model). The first that fails ends the run.
"""

from __future__ import annotations

import sys
import time
from typing import Any


def run(script: dict[str, Any]) -> None:
    """Every check of a script's globals, in the order in which they stand there."""
    url, model = sys.argv[1:3]
    for name, check in list(script.items()):
        if name.startswith("check_"):
            began = time.monotonic()
            check(url, model)
            print(f"ok {name} {time.monotonic() - began:.1f}s", flush=True)
