"""What is done in a process of its own (`apart`): a function by its name, what it is given, and what comes back.

The child is this file: it reads one errand from standard input, does it, and writes what came of it to standard output. It
must stay small, since each child loads it: no trio, no TLS.

Both sides are the same program of the same user, so values pass as pickles. What comes back was made of what strangers
wrote, though; so of all that a pickle can name, only the values that we are made of are taken.
"""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import Any, Protocol

from sidecar.errors import SidecarError

_PLAIN = {("builtins", "frozenset"), ("builtins", "set"), ("builtins", "dict")}
_PATHS = {"PosixPath", "PurePosixPath"}


class Apart(Protocol):
    """How errands are done; `apart` has the ways."""

    async def __call__(self, function: str, /, *arguments: object) -> Any:
        """Return what `function` (`module:function`) returns, or raise the `SidecarError` that it raises.

        Raises `OperatorFault` (`checker_failed`) where it could not be had done.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a function returned, or the fault that it raised."""

    value: Any = None
    fault: SidecarError | None = None


def packed(value: object) -> bytes:
    written = io.BytesIO()
    _Writer(written, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def unpacked(written: bytes) -> Done:
    """Read what a child wrote. Raises ValueError for anything else."""
    try:
        done = _Reader(io.BytesIO(written)).load()
    except Exception as error:  # a pickle that is none may raise anything
        raise ValueError(f"no answer: {type(error).__name__}") from error
    if not isinstance(done, Done):
        raise ValueError("no answer: another value")  # noqa: TRY004  (what was written is a value)
    return done


def named(function: str) -> Callable[..., Any]:
    """The function of this name, `module:function`; its module is imported."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def do() -> None:
    """Be the child: one errand, from standard input to standard output. A defect ends it with its traceback's last word."""
    function, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301  (from our own parent)
    try:
        done = Done(value=named(function)(*arguments))
    except SidecarError as fault:
        done = Done(fault=fault)
    sys.stdout.buffer.write(packed(done))
    sys.stdout.buffer.flush()


class _Writer(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        if isinstance(value, MappingProxyType):
            return _frozen, (dict(value),)
        if isinstance(value, SidecarError):
            return _fault, (type(value), value.args, value.__dict__)
        return NotImplemented


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN or (module.partition(".")[0] == "pathlib" and name in _PATHS):
            return super().find_class(module, name)
        if module == __name__ and name in {"_frozen", "_fault"}:
            return super().find_class(module, name)
        if module.partition(".")[0] == "sidecar":
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, SidecarError)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no value of ours")


def _frozen(items: Mapping[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(dict(items))


def _fault(kind: type[SidecarError], arguments: tuple[object, ...], said: Mapping[str, object]) -> SidecarError:
    fault = kind.__new__(kind, *arguments)
    fault.__dict__.update(said)
    return fault
