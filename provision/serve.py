"""`halo serve` with what the checks know of the NPU, which the engine may not ask; the server is engine's."""

from __future__ import annotations

from argparse import Namespace

from engine import commands
from engine.commands import configure_serve as configure_serve
from engine.router import NpuReport


def run_serve(args: Namespace) -> int:
    """Serve until told to end."""
    return commands.run_serve(args, npu_report)


def npu_report() -> NpuReport:
    """What the checks know of the NPU now. They are imported when somebody asks: a start does not wait."""
    from checks.npu_report import npu_report as report

    return report()
