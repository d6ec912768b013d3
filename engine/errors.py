"""The one error type: a sentence that says what, a hint that says what to do, and an exit code."""

from __future__ import annotations

from typing import Final

EXIT_WELL: Final = 0
EXIT_ERROR: Final = 1
EXIT_DEGRADED: Final = 2
EXIT_COULD_NOT_RUN: Final = 3


class HaloError(Exception):
    """An error that a person can act on.

    `message` is one sentence saying what went wrong. `hint` says what to do about it, with the command
    to run where there is one. `exit_code` is what the process ends with: 1 an error, 2 degraded, 3 could
    not run.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message
