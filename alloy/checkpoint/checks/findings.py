"""Findings of a merge's checks, gathered: everything wrong is reported at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from alloy.errors import CheckpointError, MergeError

T = TypeVar("T")


@dataclass
class Findings:
    """Problems, which stop a merge, and notes, which go into its plan and its record."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if text not in self.problems:  # two checks may read one file
            self.problems.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def attempt(self, function: Callable[..., T], *arguments: object) -> T | None:
        """The function's result, or None and a problem where it refuses."""
        try:
            return function(*arguments)
        except (CheckpointError, MergeError) as error:
            self.problem(str(error))
            return None

    def stop(self) -> None:
        """Raise MergeError with every problem, if there is one."""
        if self.problems:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            raise MergeError(
                self.problems[0]
                if len(self.problems) == 1
                else f"{len(self.problems)} problems:\n{lines}"
            )
