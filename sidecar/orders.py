"""What a supervisor and its workers say to each other, over a `wire.channel`.

Orders go down as pickles: they hold keys and a whole configuration, come from whoever started the worker, and are read by a
process that has less to lose. What comes up was made where strangers are listened to, so it is JSON and lines of text, and
never a pickle.

    down   order     one of the values below; those with a `number` are answered when they have been obeyed
    up     word      JSON: {"is": "ready"} · {"failed": code, "detail": …} · {"obeyed": number, "refused": [code, detail] | null}
                     · {"told": number, …} what was measured (`told`)
           access    lines of the access log, decision  of the decision log: whole lines, without the last end
           compared  JSON: a decision for the candidate that is compared (`compared`)
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from sidecar.config import Config
from sidecar.errand import packed
from sidecar.model import Allow, Decided, Deny, Identity, Inquiry, Lending

ORDER, WORD, ACCESS, DECISION, COMPARED = b"o", b"w", b"a", b"d", b"c"
"""Kinds of frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The first order: all that a worker has to know."""

    worker: int
    """From 0."""
    config: Config
    """Its share (`parts.share`)."""
    pseudonym: str
    labels: Mapping[str, str]
    """Of decision log events."""
    identity: Identity | None
    lending: Lending | None
    offered: bool
    sockets: Mapping[str, tuple[int, ...]]
    """By the key of the configuration: a descriptor for each queue."""
    sample: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Accept from these queues from now on, by the key of the configuration."""

    queues: Mapping[str, frozenset[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    identity: Identity = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """Another bundle is on its way in (or not any more): repeat nothing meanwhile."""

    on_its_way: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Lend:
    """Ask this OPA. Obeyed when the one before is asked nothing any more."""

    number: int
    lending: Lending


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    number: int
    config: Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Put this in force. One that began since `Prepare` was said has not prepared it."""

    number: int
    config: Config
    identity: Identity | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LetGo:
    """Close the queues that you do not accept from."""

    number: int
    side: Literal["inbound", "outbound", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Take what waits in your queues and nothing more. Obeyed when the last connection has ended."""

    number: int
    side: Literal["inbound", "outbound", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Say that you are there, and what you have measured."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Pass on this share of decisions, for a candidate to be compared with."""

    sample: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Cut off what is open, and end."""


Order: TypeAlias = (
    Begin | Serve | Present | Offered | Lend | Prepare | Apply | Abandon | LetGo | Finish | Tell | Compare | Stop
)
KINDS = (Begin, Serve, Present, Offered, Lend, Prepare, Apply, Abandon, LetGo, Finish, Tell, Compare, Stop)


def written(order: Order) -> bytes:
    return packed(order)


def order(payload: bytes) -> Order:
    """Raises ValueError for what is none."""
    read = pickle.loads(payload)  # noqa: S301  (from whoever started us, over a socket that nobody else has)
    if not isinstance(read, KINDS):
        raise ValueError("no order")  # noqa: TRY004  (what was written is a value)
    return read


def word(said: Mapping[str, object]) -> bytes:
    return json.dumps(said, separators=(",", ":")).encode("ascii")


def compared(decided: Decided) -> bytes | None:
    """A decision for whoever compares; None where there was none, or it cannot be told."""
    if decided.decision is None:
        return None
    kind = "allow" if isinstance(decided.decision, Allow) else "deny"
    try:
        return json.dumps(
            [kind, _values(decided.inquiry), _values(decided.decision), decided.exchange_id, decided.at, decided.seconds],
            separators=(",", ":"), default=_plain,
        ).encode("ascii")  # fmt: skip
    except (TypeError, ValueError, RecursionError):
        return None


def decided(payload: bytes) -> Decided:
    """Raises ValueError or TypeError for what `compared` has not made."""
    kind, inquiry, decision, exchange_id, at, seconds = json.loads(payload)
    made: type[Allow | Deny] = {"allow": Allow, "deny": Deny}[kind]
    if "request_headers_removed" in decision:
        decision["request_headers_removed"] = frozenset(decision["request_headers_removed"])
    return Decided(
        at=float(at), exchange_id=str(exchange_id), inquiry=Inquiry(**inquiry), decision=made(**decision), error=None,
        seconds=float(seconds),
    )  # fmt: skip


def _values(of: Inquiry | Allow | Deny) -> dict[str, Any]:
    return {one.name: getattr(of, one.name) for one in fields(of)}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (frozenset, set)):
        return sorted(value, key=str)
    raise TypeError(type(value).__name__)
