"""`sidecar policy …`: test rules, ask one question of them, and decide again what was decided before.

None of it touches a running sidecar. Rules come from a signed bundle, whose signature is not looked at here, or from sources
as `sidecar bundle build` takes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sidecar.cli import harmless
from sidecar.cli.bundle import once, opa_binary, pair
from sidecar.errors import ClientFault, NoDecision, OperatorFault

if TYPE_CHECKING:
    from sidecar.decision.inquiry import Contract
    from sidecar.decision.replay import Tally
    from sidecar.model import Decision, Direction, Inquiry

_DIRECTIONS = ("inbound", "outbound", "egress", "management", "fleet")
_OUT = frozenset({"outbound", "egress"})


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("policy", help="test policy, ask it, and replay decisions against it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    test = commands.add_parser(
        "test", help="run `opa test` with coverage", description="Run the tests of policies with coverage."
    )
    test.add_argument(
        "directory", metavar="DIR", type=Path, nargs="+", help="rules, their tests (*_test.rego) and data"
    )
    test.add_argument("--library", action="store_true", help="let them import the library that came with this program")
    test.add_argument("--threshold", metavar="PERCENT", type=_percent, default=0.0, help="fail below this coverage")
    test.set_defaults(command=_test, config=None)

    simulate = commands.add_parser(
        "simulate",
        help="ask policy one question",
        description="Ask policy one question; exit 1 where it does not allow.",
    )
    simulate.add_argument("caller", metavar="SPIFFE_ID", help="who asks; `anonymous` for a caller without identity")
    simulate.add_argument("method")
    simulate.add_argument("path", help="with its query, if it has one")
    simulate.add_argument("--direction", choices=_DIRECTIONS, default="inbound")
    simulate.add_argument("--mtls-mode", choices=("strict", "permissive", "disabled"), default="permissive")
    simulate.add_argument("--plaintext", action="store_true", help="outbound, egress: as if it went without TLS")
    simulate.add_argument("--host", default="localhost:8443", metavar="HOST[:PORT]", help="the authority")
    simulate.add_argument("--header", metavar="NAME=VALUE", type=_header, action="append", default=[])
    simulate.add_argument("--route", metavar="NAME", help="outbound: the route that it would take")
    simulate.add_argument(
        "--to", metavar="SPIFFE_ID", action="append", default=[], help="outbound: an ID that the target may prove"
    )
    _policies(simulate)
    simulate.add_argument(
        "--input", choices=("sidecar", "envoy"), default="sidecar", help="the words to ask in (policy.input)"
    )
    simulate.add_argument("--json", action="store_true", help="the question and the whole answer")
    simulate.set_defaults(command=_simulate, config=None)

    replay = commands.add_parser(
        "replay", help="decide recorded decisions again",
        description="Decide recorded decisions again under another policy; exit 1 where more flip than expected.",
    )  # fmt: skip
    replay.add_argument(
        "decisions", metavar="DECISIONS", type=Path, nargs="+", help="decision logs, JSON lines or arrays, also .gz"
    )
    _policies(replay)
    replay.add_argument(
        "--shard", metavar="I/N", type=_shard, default=(1, 1), help="only every N-th event, from the I-th on"
    )
    replay.add_argument("--max-allow-to-deny", metavar="N", type=_count, default=0, help="so many are expected")
    replay.add_argument("--max-deny-to-allow", metavar="N", type=_count, default=0, help="so many are expected")
    replay.add_argument("--examples", metavar="N", type=_count, default=10, help="flips to show (default: 10)")
    replay.add_argument("--json", action="store_true", help="the tally for programs")
    replay.set_defaults(command=_replay, config=None)


def _policies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="FILE", type=Path, help="a bundle")
    parser.add_argument(
        "--policy", metavar="DIR", type=Path, help="rules (default: the library that came with this program)"
    )
    parser.add_argument("--overlay", metavar="TEAM=DIR", type=pair, action="append", default=[])
    parser.add_argument("--data", metavar="FILE", type=Path, action="append", default=[], help="a data document")
    parser.add_argument("--entrypoint", metavar="PATH", help="a rule below data (default: our own for the direction)")


# ── test ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _test(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build, coverage  # noqa: PLC0415  other commands need none of it

    library = build.library() if arguments.library else None
    tested = coverage.tested(opa_binary(), arguments.directory, library)
    print(tested.said, end="")
    if not tested.passed:
        return 1
    for line in tested.missed:
        print(f"{line}: not covered")
    print(f"coverage: {tested.share:.4g} %")
    if tested.share < arguments.threshold:
        raise OperatorFault(f"coverage is {tested.share:.4g} %, and at least {arguments.threshold:g} % is asked for")
    return 0


# ── simulate ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _simulate(arguments: argparse.Namespace) -> int:
    from sidecar.decision import inquiry, rehearsal  # noqa: PLC0415  other commands have no need of the client of OPA

    words, asked = _words(arguments), _inquiry(arguments)
    entrypoint = arguments.entrypoint or words.path(asked.direction)
    try:
        question = json.loads(words.question(asked))["input"]
    except NoDecision as error:
        raise OperatorFault(f"{error}: a sidecar answers 503") from error
    with rehearsal.rehearsing(opa_binary(), _files(arguments)) as private:
        [answer] = private.decide(entrypoint, [question])
    undefined = isinstance(answer, rehearsal.NoAnswer)
    decision: Decision | NoDecision
    try:
        if undefined:
            raise NoDecision(str(answer), code="decision_undefined")
        said = json.dumps({"result": answer}).encode()
        decision = inquiry.answer(said, decision_id="", bundle=None, read=words.read)
    except NoDecision as error:
        decision = error
    if arguments.json:
        print(json.dumps({"input": question, "result": None if undefined else answer}, indent=2))
    else:
        print("\n".join(map(harmless, _told(decision, entrypoint))))
    return 0 if _allows(decision) else 1


def _told(decision: Decision | NoDecision, entrypoint: str) -> Iterator[str]:
    if isinstance(decision, NoDecision):
        yield f"no decision: {entrypoint}: {decision}"
        yield "  a sidecar answers 503"
        return
    yield "allowed" if _allows(decision) else "denied"
    for name in ("rule", "reason", "status"):
        if getattr(decision, name, None) is not None:
            yield f"  {name}: {getattr(decision, name)}"


def _allows(decision: Decision | NoDecision) -> bool:
    from sidecar.model import Allow  # noqa: PLC0415

    return isinstance(decision, Allow)


def _words(arguments: argparse.Namespace) -> Contract:
    from sidecar.decision import envoy, inquiry  # noqa: PLC0415

    return envoy.contract("envoy/authz/allow") if arguments.input == "envoy" else inquiry.OURS


def _inquiry(arguments: argparse.Namespace) -> Inquiry:
    """The question as a sidecar would ask it, the path in its one spelling."""
    from sidecar.model import Inquiry  # noqa: PLC0415
    from sidecar.wire import target  # noqa: PLC0415

    direction = cast("Direction", arguments.direction)
    try:
        asked = target.origin_form(arguments.path.encode("utf-8", "surrogateescape"))
        query = target.query_pairs(asked.query)
        host, port = target.authority(arguments.host.encode())
    except ClientFault as fault:
        raise OperatorFault(f"{fault.public}: a sidecar answers it with {fault.status}") from fault
    headers: dict[str, tuple[str, ...]] = {}
    for name, value in arguments.header:
        headers[name] = (*headers.get(name, ()), value)
    caller, reason = _caller(arguments)
    out = direction in _OUT
    return Inquiry(
        direction=direction, caller=caller, caller_reason=reason, method=arguments.method, path=asked.path,
        segments=asked.segments, query=query, headers=headers, mtls_mode=arguments.mtls_mode,
        tls=not arguments.plaintext if out else caller is not None, host=host, port=port, protocol="HTTP/1.1",
        target=_target(arguments, host, port) if out else None,
    )  # fmt: skip


def _caller(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    from sidecar.identity import spiffe  # noqa: PLC0415

    out = arguments.direction in _OUT
    if arguments.plaintext and not out:
        raise OperatorFault("--plaintext is for outbound and egress; whoever comes in plaintext is `anonymous`")
    if arguments.caller == "anonymous":
        if out:
            raise OperatorFault(f"{arguments.direction}: the caller is the sidecar itself, by its SPIFFE ID")
        return None, "plaintext"
    try:
        return str(spiffe.parse(arguments.caller)), "local_process" if out else None
    except spiffe.SpiffeIdError as error:
        raise OperatorFault(f"{arguments.caller}: is neither a SPIFFE ID nor `anonymous`: {error}") from error


def _target(arguments: argparse.Namespace, host: str, port: int | None) -> Mapping[str, object]:
    from sidecar.model import Address  # noqa: PLC0415

    if arguments.direction == "outbound" and arguments.route is None and not arguments.to:
        raise OperatorFault("outbound needs --route, --to or both: what policy knows of the target")
    return {"address": str(Address(host=host, port=port or 443)), "spiffe_ids": arguments.to, "route": arguments.route}


# ── replay ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _replay(arguments: argparse.Namespace) -> int:
    from sidecar.decision import replay  # noqa: PLC0415

    opa, files = opa_binary(), _files(arguments)
    tally = replay.Tally(max_examples=arguments.examples)
    progress = sys.stderr.isatty()
    for part in replay.replayed(opa, files, arguments.decisions, arguments.shard, arguments.entrypoint, tally):
        if progress:
            done = f"{part.read:,} read, {part.decided:,} decided again, {part.flips:,} flipped"
            print(f"\r{done} ", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    if arguments.json:
        print(json.dumps(tally.summary(), indent=2))
    else:
        print("\n".join(map(harmless, _tally(tally))))
    if tally.allow_to_deny > arguments.max_allow_to_deny or tally.deny_to_allow > arguments.max_deny_to_allow:
        return 1
    if tally.decided == 0 and (tally.read or arguments.shard == (1, 1)):
        raise OperatorFault("nothing could be decided again, so nothing is proven")
    return 0


def _tally(tally: Tally) -> Iterator[str]:
    for flip in tally.examples:
        yield f"{flip.kind:<13}  {flip.caller} {flip.method} {flip.path}  (was {flip.was}, would be {flip.would})"
    if tally.flips > len(tally.examples):
        yield f"… and {tally.flips - len(tally.examples):,} more"
    yield (
        f"{tally.read:,} events: {tally.decided:,} decided again at {tally.per_second:,.0f}/s, "
        f"{tally.unverifiable:,} unverifiable (masked), {tally.skipped:,} without a decision"
    )
    if tally.failed:
        yield f"no decision any more: {tally.failed:,}"
    yield f"allow to deny: {tally.allow_to_deny:,}   deny to allow: {tally.deny_to_allow:,}"


# ── sources and arguments ─────────────────────────────────────────────────────────────────────────────────────────


def _files(arguments: argparse.Namespace) -> Mapping[str, bytes]:
    from sidecar.bundles import build  # noqa: PLC0415
    from sidecar.cli import files  # noqa: PLC0415

    if arguments.bundle is None:
        policies, overlays = arguments.policy or build.library(), once("--overlay", arguments.overlay)
        return build.files(build.Sources(policies=policies, overlays=overlays, data=arguments.data))
    if arguments.policy or arguments.overlay or arguments.data:
        raise OperatorFault("--bundle holds rules and data already: leave --policy, --overlay and --data out")
    try:
        return files.read_bundle(arguments.bundle).files
    except OperatorFault as fault:
        raise OperatorFault(f"{arguments.bundle}: {fault}", code=fault.code) from fault


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name.lower(), value


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError("must be a number from 0 to 100")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    index, sign, count = text.partition("/")
    if not sign or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError("must be I/N, with I from 1 to N")
    return int(index), int(count)
