"""`sidecar rollout …`: publish to a bundle server, move a rollout, and see who runs what."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sidecar.cli import asking, harmless
from sidecar.cli.asking import Asking
from sidecar.errors import OperatorFault

_OFF = frozenset({"off", "none", "null"})
_ACTIONS = {
    "promote": "give the candidate to the next ring; out of the last one it settles",
    "pause": "leave everybody where they are",
    "resume": "go on after a pause or a halt",
    "halt": "send the rings back to the current serial",
    "rollback": "send everybody back to the serial before",
}


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("rollout", help="publish to a bundle server, move a rollout, see who runs what")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    status = _command(commands, "status", _status, "the rollout, and who runs what, who is behind, since when")
    status.add_argument("--only-behind", action="store_true", help="leave out who is in order")
    status.add_argument("--watch", action="store_true", help="tell it again whenever it has changed, until interrupted")

    _command(commands, "versions", _versions, "what was published")

    publish = _command(commands, "publish", _publish, "hand a signed bundle to the server, which verifies it")
    publish.add_argument("file", type=Path, metavar="FILE")

    start = _command(commands, "start", _start, "begin to bring a published version to the fleet")
    start.add_argument("serial", type=int, metavar="SERIAL")
    start.add_argument(
        "--ring", metavar="NAME:WHO", type=ring, action="append", default=[],
        help="label=NAME=VALUE[,label=…] or percent=N; in order, the last one percent=100 (default: as the rollout before)",
    )  # fmt: skip
    start.add_argument("--shadow-first", action="store_true", help="have it asked beside, and run by nobody yet")
    _order(start, gates=True)

    for action, help_ in _ACTIONS.items():
        _order(_command(commands, action, _move, help_), gates=action in {"promote", "resume"})

    audit = _command(commands, "audit", _audit, "who did what, when and why")
    audit.add_argument("--after", metavar="ID", type=int, default=0, help="only what came later")
    audit.add_argument("--limit", metavar="N", type=int, default=100)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, Asking], Awaitable[None]],
    help_: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
    parser.add_argument("--bundle", metavar="NAME", default="sidecar", help="which bundle (default: sidecar)")
    parser.add_argument("--json", action="store_true", help="for programs: what the server says")
    asking.add_arguments(parser)
    parser.set_defaults(command=_asked, run=run, action=name)
    return parser


def _order(parser: argparse.ArgumentParser, *, gates: bool) -> None:
    parser.add_argument("--why", metavar="TEXT", required=True, help="for the audit log")
    parser.add_argument("--if-version", metavar="N", type=int, help="only if the rollout is the one that status showed")
    if gates:
        parser.add_argument(
            "--gate", metavar="NAME=VALUE", type=gate, action="append", default=[], help="a number, or `off`"
        )


def _asked(arguments: argparse.Namespace) -> int:
    arguments.config = arguments.identity_config  # where `main` finds the lines of what is wrong with it
    asking.run(asking.server_of(arguments), partial(arguments.run, arguments))
    return 0


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def _status(arguments: argparse.Namespace, way: Asking) -> None:
    import trio  # noqa: PLC0415

    name, before = asking.segment(arguments.bundle), ""
    while True:
        try:
            rollout = await way.get(f"/v1/rollouts/{name}")
            fleet = await way.get(f"/v1/fleet/{name}" + ("?only=behind" if arguments.only_behind else ""))
            if arguments.json:
                text = json.dumps({"rollout": rollout, "fleet": fleet}, indent=2)
            else:
                text = "\n".join(map(harmless, [*summary(rollout), "", *_table(fleet)]))
        except OperatorFault as fault:
            if not arguments.watch:
                raise
            text = f"sidecar: {fault}"
        if text != before:
            if arguments.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(text, flush=True)
            before = text
        if not arguments.watch:
            return
        await trio.sleep(2.0)


async def _versions(arguments: argparse.Namespace, way: Asking) -> None:
    told = await way.get(f"/v1/bundles/{asking.segment(arguments.bundle)}/versions")
    rows = [("SERIAL", "REVISION", "CREATED", "PUBLISHED", "BY", "DIGEST", "MAY RETURN TO")]
    rows += [
        (
            str(one["serial"]), one["revision"], _time(one["created"]), _time(one["published_at"]), one["published_by"],
            one["digest"][:12], _returns(one),
        )
        for one in told["versions"]
    ]  # fmt: skip
    _show(arguments, told, columns(rows))


async def _publish(arguments: argparse.Namespace, way: Asking) -> None:
    from sidecar.bundles import release  # noqa: PLC0415
    from sidecar.cli import files  # noqa: PLC0415

    try:
        said = release.release(files.read_bundle(arguments.file))
        archive = arguments.file.read_bytes()
    except OperatorFault as fault:
        raise OperatorFault(f"{arguments.file}: {fault}", code=fault.code) from fault
    told = await way.put(f"/v1/bundles/{asking.segment(arguments.bundle)}/versions/{said.serial}", archive)
    words = {"created": "is published", "same": "was published before", "signed_anew": "is published, signed anew"}
    _show(
        arguments, told,
        [f"{arguments.bundle} serial {told['serial']} ({told['revision']}) {words.get(told['outcome'], told['outcome'])}"],
    )  # fmt: skip


async def _start(arguments: argparse.Namespace, way: Asking) -> None:
    order: dict[str, object] = {"serial": arguments.serial, "shadow_first": arguments.shadow_first}
    if arguments.ring:
        order["rings"] = arguments.ring
    await _ordered(arguments, way, order)


async def _move(arguments: argparse.Namespace, way: Asking) -> None:
    await _ordered(arguments, way, {})


async def _ordered(arguments: argparse.Namespace, way: Asking, order: dict[str, object]) -> None:
    order |= {"action": arguments.action, "why": arguments.why}
    if gates := getattr(arguments, "gate", None):
        order["gates"] = dict(gates)
    told = await way.post(f"/v1/rollouts/{asking.segment(arguments.bundle)}", order, only_if=arguments.if_version)
    _show(arguments, told, summary(told))


async def _audit(arguments: argparse.Namespace, way: Asking) -> None:
    told = await way.get(
        f"/v1/rollouts/{asking.segment(arguments.bundle)}/audit?after={arguments.after}&limit={arguments.limit}"
    )
    rows = [("ID", "WHEN", "WHAT", "WHO", "LED TO", "WHY")]
    rows += [
        (str(one["id"]), _time(one["at"]), one["action"], one["who"], _outcome(one["to"]), one["why"])
        for one in told["entries"]
    ]
    lines = [*columns(rows)]
    if told["next"] is not None:
        lines.append(f"more: --after {told['next']}")
    _show(arguments, told, lines)


# ── what is read ──────────────────────────────────────────────────────────────────────────────────────────────────


def ring(text: str) -> dict[str, object]:
    """`canary:label=ring=canary`, `tenth:percent=10`. Raises `ArgumentTypeError`."""
    name, colon, rest = text.partition(":")
    labels: dict[str, str] = {}
    percent: float | None = None
    for part in rest.split(","):
        kind, _, value = part.partition("=")
        label, sign, wanted = value.partition("=")
        if kind == "label" and sign and label and label not in labels:
            labels[label] = wanted
        elif kind == "percent" and percent is None and (number := _number(value)) is not None:
            percent = number
        else:
            colon = ""
    if not name or not colon or bool(labels) == (percent is not None):
        raise argparse.ArgumentTypeError("must be NAME:label=NAME=VALUE[,label=…] or NAME:percent=N")
    return {"name": name, "labels": labels} if percent is None else {"name": name, "percent": percent}


def gate(text: str) -> tuple[str, float | int | None]:
    """`max_shadow_flips=0`, `max_behind=off`. Raises `ArgumentTypeError`."""
    name, sign, value = text.partition("=")
    number = None if value.lower() in _OFF else _number(value)
    if not name or not sign or (number is None and value.lower() not in _OFF):
        raise argparse.ArgumentTypeError("must be NAME=NUMBER or NAME=off")
    return name, number


def _number(text: str) -> float | int | None:
    if text.isascii() and text.isdecimal():
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────────────────────


def summary(told: Mapping[str, Any]) -> Iterator[str]:
    """A rollout in lines: where it stands, its rings with what has been reached, and what stands in its way."""
    parts = [f"{told['bundle']}: {told['state']}"]
    for name, word in (("current", "current"), ("candidate", "candidate"), ("previous", "before")):
        if told[name] is not None:
            parts.append(f"{word} {told[name]}")
    yield ", ".join([*parts, f"version {told['version']}"])
    if told["reason"]:
        yield f"why: {told['reason']}"
    if told["candidate"] is not None and told["state"] in {"rolling", "paused"}:
        if not told["reached"]:
            yield "no ring runs the candidate; it is asked beside"
        if not told["candidate_may_return"] and told["current"] is not None:
            yield f"there is no way back: {told['candidate']} does not allow the return to {told['current']}"
    rows = [
        ("reached" if number < told["reached"] else "", ring["name"], _who(ring))
        for number, ring in enumerate(told["rings"])
    ]
    if rows:
        yield from columns([("", "RING", "WHO"), *rows])
    for one in told["broken_gates"]:
        yield f"gate broken: {one}"
    for one in told["unmet"]:
        yield f"before it is promoted: {one}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _table(fleet: Mapping[str, Any]) -> list[str]:
    from sidecar.fleet import status  # noqa: PLC0415

    return status.table(fleet)


def _who(ring: Mapping[str, Any]) -> str:
    if ring.get("percent") is not None:
        return f"{ring['percent']:g} %"
    return ", ".join(f"{name}={value}" for name, value in ring["labels"].items())


def _outcome(after: Mapping[str, Any] | None) -> str:
    """Of an entry: a version, or a rollout."""
    if after is None:
        return "-"
    if "state" not in after:
        return f"serial {after['serial']}"
    moving = f" to {after['candidate']}" if after["candidate"] is not None else ""
    return f"{after['state']} {after['current'] if after['current'] is not None else '-'}{moving}"


def _returns(version: Mapping[str, Any]) -> str:
    if not version["may_return_to"]:
        return "-"
    until = f" until {_time(version['return_until'])}" if version["return_until"] is not None else ""
    return ", ".join(map(str, version["may_return_to"])) + until


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _show(arguments: argparse.Namespace, told: Mapping[str, Any], lines: Sequence[str] | Iterator[str]) -> None:
    if arguments.json:
        print(json.dumps(told, indent=2))
    else:
        for line in lines:
            print(harmless(line))
