"""What is wrong with a configuration: known to whoever tells an operator, without what it was read with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sidecar.errors import OperatorFault


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to mend. `line` counts from 1; None where the file has no line for it. `path` is "" for the whole."""

    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        where = (
            self.path if self.line is None else f"line {self.line}: {self.path}" if self.path else f"line {self.line}"
        )
        return f"{where}: {self.message}" if where else self.message


class ConfigError(OperatorFault):
    """The configuration cannot be used; `problems` are all that was found, in the order of their lines."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line or 0, problem.path, problem.message)))
        super().__init__("\n".join(map(str, self.problems)))
