"""What an HTTP/2 connection remembers while nothing happens on it: settings, compression table, how streams closed. No I/O.

A connection that waits costs what it remembers, and a sidecar has thousands of them. hyper-h2 and hpack keep each setting and
each table in a queue of its own, of which the least has room for 64; and how a stream closed, for a thousand of them,
however it did. Here is the same with room for what there is.

The names with an underscore are h2's own, as in `h2_protocol`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from h2.exceptions import InvalidSettingsValueError
from h2.settings import ChangedSetting, SettingCodes, _validate_setting
from h2.settings import Settings as H2Settings
from h2.stream import StreamClosedBy
from hpack.table import HeaderTable as HpackTable

Code: TypeAlias = SettingCodes | int

_OVERHEAD = 32
"""What an entry counts for on top of its name and value (RFC 7541 §4.1)."""
_MAX_RESET = 1000
"""Streams that were reset: what the peer had sent before it knew is still to come."""
_MAX_ENDED = 32
"""Streams that ended on both sides: nothing comes for them but by mistake, and then only the name of the error is at stake."""
_RESET, _WAS_RESET = StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM


class Settings(H2Settings):
    """h2's, where a setting is its value, or a tuple of that and of those that were proposed and not acknowledged so far.

    None is the value of what was proposed and has never had one.
    """

    def __init__(self, client: bool = True, initial_values: dict[SettingCodes, int] | None = None) -> None:
        self._client = client
        values: dict[Any, Any] = {
            SettingCodes.HEADER_TABLE_SIZE: 4096,
            SettingCodes.ENABLE_PUSH: int(client),
            SettingCodes.INITIAL_WINDOW_SIZE: 65535,
            SettingCodes.MAX_FRAME_SIZE: 16384,
            SettingCodes.ENABLE_CONNECT_PROTOCOL: 0,
        }
        for code, value in (initial_values or {}).items():
            values[code] = _sound(code, value)
        self._settings = values

    def acknowledge(self) -> dict[Code, ChangedSetting]:
        """Put in force what was proposed first, of each setting. Returns what has changed by that."""
        settings: dict[Any, Any] = self._settings
        changed: dict[Code, ChangedSetting] = {}
        for code, value in settings.items():
            if type(value) is tuple:
                old, new, *later = value
                settings[code] = (new, *later) if later else new
                changed[code] = ChangedSetting(code, old, new)
        return changed

    def get(self, key: Code, default: Any = None) -> Any:
        """Without an exception where nothing was ever said: that is asked for each request to an upstream."""
        value: Any = self._settings.get(key)
        if type(value) is tuple:
            value = value[0]
        return default if value is None else value

    def __getitem__(self, key: Code) -> int:
        value: int | None = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: Code, value: int) -> None:
        settings: dict[Any, Any] = self._settings
        old = settings.get(key)
        settings[key] = (*(old if type(old) is tuple else (old,)), _sound(key, value))


def _sound(code: Code, value: int) -> int:
    if error := _validate_setting(code, value):
        raise InvalidSettingsValueError(f"Setting {code} has invalid value {value}", error_code=error)
    return value


class HeaderTable(HpackTable):
    """hpack's, as a list, the newest first."""

    def __init__(self) -> None:
        self._maxsize = HpackTable.DEFAULT_SIZE
        self._current_size = 0
        self.resized = False
        self.dynamic_entries: list[tuple[bytes, bytes]] = []  # type: ignore[assignment]

    def add(self, name: bytes, value: bytes) -> None:
        """An entry that is larger than the table empties it and is not kept (RFC 7541 §4.4)."""
        size = len(name) + len(value) + _OVERHEAD
        if size > self._maxsize:
            self.dynamic_entries.clear()
            self._current_size = 0
            return
        self.dynamic_entries.insert(0, (name, value))
        self._current_size += size
        if self._current_size > self._maxsize:
            self._shrink()


class ClosedStreams(dict[int, StreamClosedBy | None]):
    """How streams have closed that are gone, by number: of those that were reset the last thousand, of the others the last few.

    None of one that is not known, as of one that was skipped.
    """

    __slots__ = ("_ended",)

    def __init__(self) -> None:
        super().__init__()
        self._ended: dict[int, StreamClosedBy | None] = {}

    def __setitem__(self, stream_id: int, closed_by: StreamClosedBy | None) -> None:
        if closed_by is _RESET or closed_by is _WAS_RESET:
            super().__setitem__(stream_id, closed_by)
            if len(self) > _MAX_RESET:
                del self[next(iter(self))]
        else:
            ended = self._ended
            ended[stream_id] = closed_by
            if len(ended) > _MAX_ENDED:
                del ended[next(iter(ended))]

    def __missing__(self, stream_id: int) -> StreamClosedBy | None:
        return self._ended.get(stream_id)
