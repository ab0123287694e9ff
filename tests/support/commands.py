"""One group of commands of `sidecar`, run in this process."""

from __future__ import annotations

import pytest

from sidecar import cli


class Commands:
    """Runs commands of `group`; `out` and `err` are what the last one said."""

    def __init__(self, group: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = self.err = ""
        self._group = group
        self._capsys = capsys

    def __call__(self, *arguments: object) -> int:
        code = cli.main([self._group, *map(str, arguments)])
        self.out, self.err = self._capsys.readouterr()
        return code

    def misused(self, *arguments: object) -> str:
        """What is said of arguments that are none."""
        with pytest.raises(SystemExit) as caught:
            self(*arguments)
        assert caught.value.code == 2
        return self._capsys.readouterr().err
