"""`sidecar policy …`: test rules, ask one question of them, and decide again what was decided before.

None of it touches a running sidecar. Rules come from a signed bundle, whose signature is not looked at here, or from sources
as `sidecar bundle build` takes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from sidecar.cli.bundle import opa_binary, pair
from sidecar.errors import ClientFault, OperatorFault

if TYPE_CHECKING:
    from sidecar.decision.replay import Tally


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("policy", help="test policy, ask it, and replay decisions against it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    test = commands.add_parser(
        "test", help="run `opa test` with coverage", description="Run the tests of policies with coverage."
    )
    test.add_argument("directory", metavar="DIR", type=Path, nargs="+", help="rules, tests and data")
    test.add_argument("--threshold", metavar="PERCENT", type=float, default=0.0, help="fail below this coverage")
    test.set_defaults(command=_test, config=None)

    simulate = commands.add_parser(
        "simulate",
        help="ask policy one question",
        description="Ask policy one question; exit 1 where it does not allow.",
    )
    simulate.add_argument("caller", metavar="SPIFFE_ID", help="who asks; `anonymous` for a caller without identity")
    simulate.add_argument("method")
    simulate.add_argument("path", help="with its query, if it has one")
    simulate.add_argument(
        "--direction", choices=("inbound", "outbound", "egress", "management", "fleet"), default="inbound"
    )
    simulate.add_argument("--mtls-mode", choices=("strict", "permissive", "disabled"), default="permissive")
    simulate.add_argument("--plaintext", action="store_true", help="as if it had not come over mutual TLS")
    simulate.add_argument("--host", default="localhost")
    simulate.add_argument("--header", metavar="NAME=VALUE", type=_header, action="append", default=[])
    simulate.add_argument("--target", metavar="JSON", type=_object, help="for outbound: {address, spiffe_ids, route}")
    _policies(simulate)
    simulate.add_argument("--json", action="store_true", help="the question and the whole answer")
    simulate.set_defaults(command=_simulate, config=None)

    replay = commands.add_parser(
        "replay", help="decide recorded decisions again",
        description="Decide recorded decisions again under another policy; exit 1 where more flip than expected.",
    )  # fmt: skip
    replay.add_argument(
        "decisions", metavar="DECISIONS", type=Path, nargs="+", help="decision logs, JSON lines, also .gz"
    )
    _policies(replay)
    replay.add_argument(
        "--shard", metavar="I/N", type=_shard, default=(1, 1), help="only every N-th event, from the I-th on"
    )
    replay.add_argument("--max-allow-to-deny", metavar="N", type=int, default=0)
    replay.add_argument("--max-deny-to-allow", metavar="N", type=int, default=0)
    replay.add_argument("--examples", metavar="N", type=int, default=10, help="flips to show (default: 10)")
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


def _test(arguments: argparse.Namespace) -> int:
    missing = [directory for directory in arguments.directory if not directory.exists()]
    if missing:
        raise OperatorFault(f"{missing[0]}: is not there")
    command = [str(opa_binary()), "test", "--verbose", "--fail-on-empty", "--timeout", "30s", "--bundle"]
    done = subprocess.run([*command, *arguments.directory], check=False)
    if done.returncode:
        return 1
    counted = subprocess.run(
        [*command, "--coverage", "--format", "json", *arguments.directory], check=False, capture_output=True, text=True
    )
    try:
        covered = json.loads(counted.stdout)
    except ValueError:
        raise OperatorFault(f"opa test --coverage: {counted.stderr or counted.stdout}") from None
    for name, file in sorted(covered.get("files", {}).items()):
        for lines in file.get("not_covered", []):
            print(f"{name}:{lines['start']['row']}: not covered")
    share = float(covered.get("coverage", 0.0))
    print(f"coverage: {share:g} %")
    if share < arguments.threshold:
        raise OperatorFault(f"coverage is {share:g} %, and at least {arguments.threshold:g} % is asked for")
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    from sidecar.decision import rehearsal, replay  # noqa: PLC0415  other commands have no need of the client of OPA

    question = _question(arguments)
    entrypoint = arguments.entrypoint or f"sidecar/{arguments.direction}/decision"
    with rehearsal.rehearsing(opa_binary(), _files(arguments), entrypoint) as private:
        [answer] = private.decide([question])
    undefined = answer is rehearsal.UNDEFINED
    if arguments.json:
        print(json.dumps({"input": question, "result": None if undefined else answer}, indent=2))
    elif undefined:
        print(f"no decision: {entrypoint} is undefined for this question; the sidecar answers 503")
    else:
        for line in _told(answer):
            print(line)
    return 0 if not undefined and replay.allows(answer) else 1


def _replay(arguments: argparse.Namespace) -> int:
    from sidecar.decision import replay  # noqa: PLC0415

    opa, files = opa_binary(), _files(arguments)
    tally = replay.Tally(max_examples=arguments.examples)
    for part in replay.replayed(opa, files, arguments.decisions, arguments.shard, arguments.entrypoint, tally):
        if sys.stderr.isatty():
            print(
                f"\r{part.read:,} read, {part.decided:,} decided again, {part.flips:,} flipped", end="", file=sys.stderr
            )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if arguments.json:
        print(json.dumps(tally.summary(), indent=2))
    else:
        for line in _tally(tally):
            print(line)
    unexpected = tally.allow_to_deny > arguments.max_allow_to_deny or tally.deny_to_allow > arguments.max_deny_to_allow
    return int(unexpected or tally.decided == 0)


def _tally(tally: Tally) -> Iterator[str]:
    for flip in tally.examples:
        yield f"{flip.kind:<13} {flip.caller} {flip.method} {flip.path}  (was {flip.was}, would be {flip.would})"
    if tally.flips > len(tally.examples):
        yield f"… and {tally.flips - len(tally.examples):,} more"
    yield (
        f"{tally.read:,} events: {tally.decided:,} decided again at {tally.per_second:,.0f}/s, "
        f"{tally.unverifiable:,} unverifiable (masked), {tally.skipped:,} without a decision"
    )
    yield f"allow to deny: {tally.allow_to_deny:,}   deny to allow: {tally.deny_to_allow:,}"


def _told(answer: object) -> Iterator[str]:
    from sidecar.decision.replay import allows  # noqa: PLC0415

    yield "allowed" if allows(answer) else "denied"
    if isinstance(answer, Mapping):
        for name in ("rule", "reason", "status"):
            if name in answer:
                yield f"  {name}: {answer[name]}"


def _question(arguments: argparse.Namespace) -> dict[str, object]:
    """The input as a sidecar would make it, the path in its one spelling."""
    from sidecar.wire import target  # noqa: PLC0415

    try:
        asked = target.origin_form(arguments.path.encode("utf-8"))
    except ClientFault as fault:
        raise OperatorFault(f"{arguments.path}: {fault.public}: a sidecar answers it with {fault.status}") from fault
    anonymous = arguments.caller == "anonymous"
    if not anonymous and not arguments.caller.startswith("spiffe://"):
        raise OperatorFault(f"{arguments.caller}: is neither a SPIFFE ID nor `anonymous`")
    headers: dict[str, list[str]] = {}
    for name, value in arguments.header:
        headers.setdefault(name, []).append(value)
    outbound = arguments.direction == "outbound"
    return {
        "direction": arguments.direction,
        "caller": None if anonymous else arguments.caller,
        "caller_reason": "plaintext" if anonymous else "local_process" if outbound else None,
        "method": arguments.method, "path": asked.path, "segments": list(asked.segments),
        "query": parse_qs(asked.query or "", keep_blank_values=True), "headers": headers,
        "mtls_mode": arguments.mtls_mode, "tls": not (arguments.plaintext or (anonymous and not outbound)),
        "host": arguments.host, "port": 8443, "protocol": "HTTP/1.1", "target": arguments.target, "claims": None,
        "credential": None,
    }  # fmt: skip


def _files(arguments: argparse.Namespace) -> Mapping[str, bytes]:
    from sidecar.bundles import archive, build  # noqa: PLC0415

    if arguments.bundle is None:
        sources = build.Sources(
            policies=arguments.policy or build.library(), overlays=dict(arguments.overlay), data=arguments.data
        )
        return build.files(sources)
    if arguments.policy or arguments.overlay or arguments.data:
        raise OperatorFault("--bundle holds rules and data already: leave --policy, --overlay and --data out")
    try:
        return archive.read(arguments.bundle.read_bytes()).files
    except OSError as error:
        raise OperatorFault(f"{arguments.bundle}: {error.strerror}") from error


def _header(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name.lower(), value


def _object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _shard(text: str) -> tuple[int, int]:
    index, sign, count = text.partition("/")
    if not sign or not index.isdecimal() or not count.isdecimal() or not 1 <= int(index) <= int(count):
        raise argparse.ArgumentTypeError("must be I/N, with I from 1 to N")
    return int(index), int(count)
