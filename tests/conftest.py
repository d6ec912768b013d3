"""What every room's tests share: which marked tests run on this machine, and in which order."""

from __future__ import annotations

import os
import signal

import pytest

from tests.hosts.machine import missing


def pytest_configure() -> None:
    """Heed SIGINT even where a shell started this in the background: what the tests start inherits it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here with the reason, and run the test hosts after the quick tests."""
    reason = missing() if any("hosts" in item.keywords for item in items) else ""
    for item in items:
        if "slow" in item.keywords and not os.environ.get("HALO_TEST_SLOW"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with HALO_TEST_SLOW=1"))
        elif "hosts" in item.keywords and reason:
            item.add_marker(pytest.mark.skip(reason=f"the test hosts cannot run here: {reason}"))
    items.sort(key=lambda item: "hosts" in item.keywords)
