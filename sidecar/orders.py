"""What a supervisor and its workers say to each other, over a `wire.channel`.

Orders go down as pickles: they hold keys and a whole configuration, come from whoever started the worker, and are read by a
process that has less to lose. What comes up was made where strangers are listened to, so it is JSON and lines of text, and
never a pickle: `said`, `refusal`, `decided` and `intake.told` make values of it that are what they should be, or raise.

    down   order     one of the values below; those with a `number` are answered when they have been obeyed
    up     word      JSON: {"is": "ready"} · {"failed": code, "detail": …} · {"obeyed": number, "refused": [code, detail] | null}
                     · {"told": number, …} what was measured (`intake.told`)
           access    lines of the access log, decision  of the decision log: whole lines, without the last end
           compared  JSON: a decision for the candidate that is compared (`compared`)

A worker is of the version of its supervisor, or it does not begin: a pickle names values by their place, so another version
would read one setting as another.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from sidecar.config import Config
from sidecar.errand import packed
from sidecar.model import Allow, Decided, Deny, Direction, Identity, Inquiry, Lending

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


def said(payload: bytes) -> Mapping[str, Any]:
    """A word as it was said. Raises ValueError for what is none."""
    read = _json(payload)
    if not isinstance(read, dict):
        raise ValueError("no word")  # noqa: TRY004  (what was said is a value)
    return read


def refusal(of: object) -> tuple[str, str] | None:
    """Why an order was refused: code and detail; None where it was obeyed. Raises ValueError."""
    match of:
        case None:
            return None
        case [str(code), str(detail)]:
            return code, detail
    raise ValueError("no refusal")


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
    """Raises ValueError, TypeError, KeyError or AttributeError for what `compared` has not made."""
    kind, inquiry, decision, exchange_id, at, seconds = _json(payload)
    made: type[Allow | Deny] = {"allow": Allow, "deny": Deny}[kind]
    if "request_headers_removed" in decision:
        decision["request_headers_removed"] = frozenset(decision["request_headers_removed"])
    return Decided(
        at=float(at), exchange_id=str(exchange_id), inquiry=_asked(**inquiry), decision=_answered(made(**decision)),
        error=None, seconds=float(seconds),
    )  # fmt: skip


def _asked(**inquiry: Any) -> Inquiry:
    """It goes on to an OPA, and is shown: each field is what it is in every other inquiry."""
    for name in ("method", "path", "mtls_mode", "host", "protocol"):
        _is(str, inquiry[name])
    for name in ("caller", "caller_reason"):
        _is(str | None, inquiry[name])
    for name in ("target", "claims", "credential"):
        _is(dict | None, inquiry[name])
    if inquiry["direction"] not in get_args(Direction):
        raise ValueError("no direction")
    _is(bool, inquiry["tls"])
    _is(int | None, inquiry["port"])
    for values in ([inquiry["segments"]], inquiry["query"].values(), inquiry["headers"].values()):
        for of in values:
            _is(list, of)
            for one in of:
                _is(str, one)
    return Inquiry(**inquiry)


def _answered(decision: Allow | Deny) -> Allow | Deny:
    for shown in (decision.decision_id, decision.revision):
        _is(str, shown)
    _is(str | None, decision.rule)
    return decision


def _is(kind: Any, value: object) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where another value belongs")  # noqa: TRY004  (what was said is a value)


def _json(payload: bytes) -> Any:
    """Raises ValueError."""
    try:
        return json.loads(payload)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _values(of: Inquiry | Allow | Deny) -> dict[str, Any]:
    return {one.name: getattr(of, one.name) for one in fields(of)}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (frozenset, set)):
        return sorted(value, key=str)
    raise TypeError(type(value).__name__)
