"""`sidecar bundle …`: make, sign, verify, look at and compare bundles, and serve them to a fleet (`cli.serve`)."""

from __future__ import annotations

import argparse
import difflib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sidecar.cli import harmless, serve
from sidecar.errors import OperatorFault

if TYPE_CHECKING:
    from sidecar.bundles.archive import Bundle
    from sidecar.bundles.canonical import Value
    from sidecar.bundles.signature import VerifyingKey

T = TypeVar("T")

_ALGORITHMS = ("ES256", "ES384", "ES512", "EdDSA", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512")


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("bundle", help="build, sign, verify, inspect, compare and serve policy bundles")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    build = _command(
        commands, "build", _build, "make a bundle of rules, overlays and data, and sign it if a key is given"
    )
    build.add_argument(
        "--policy", metavar="DIR", type=Path, help="the rules (default: the library that came with this program)"
    )
    build.add_argument(
        "--overlay", metavar="TEAM=DIR", type=pair, action="append", default=[], help="rules of a team, in team.<TEAM>"
    )
    build.add_argument(
        "--data", metavar="FILE", type=Path, action="append", default=[], help="a data document, JSON or YAML"
    )
    build.add_argument(
        "--compile-rbac", action="store_true", help="make literal rules of data.sidecar.rbac, which OPA decides faster"
    )
    build.add_argument("--revision", required=True, help="names the policy in every decision")
    build.add_argument("--serial", type=_serial, required=True, help="higher than that of every bundle before")
    build.add_argument("--created", metavar="TIME", type=_time, help="RFC 3339 (default: now)")
    build.add_argument(
        "--may-return-to", metavar="SERIAL", type=_serial, action="append", default=[],
        help="a serial to which a fleet may be sent back from this one",
    )  # fmt: skip
    build.add_argument("--return-until", metavar="TIME", type=_time, help="RFC 3339: until when it may")
    _signing(build, required=False)
    build.add_argument("--output", "-o", metavar="FILE", type=Path, required=True)

    sign = _command(commands, "sign", _sign, "sign a bundle, in place of any signature that it has")
    sign.add_argument("bundle", type=Path)
    _signing(sign, required=True)
    sign.add_argument("--output", "-o", metavar="FILE", type=Path, help="default: the bundle itself")

    verify = _command(commands, "verify", _verify, "verify a bundle as a sidecar would")
    verify.add_argument("bundle", type=Path)
    verify.add_argument(
        "--key", metavar="ID=FILE[:ALGORITHM]", type=_public, action="append", required=True,
        help="a public key or certificate (default algorithm: ES256)",
    )  # fmt: skip
    verify.add_argument("--scope", default="sidecar")

    inspect = _command(commands, "inspect", _inspect, "say what a bundle holds; its signature is not verified")
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true", help="for programs")

    diff = _command(commands, "diff", _diff, "say what differs between two bundles; exit 1 where anything does")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)

    keys = _command(commands, "keygen", _keygen, "make an ES256 key pair for signing")
    keys.add_argument("private", type=Path, help="the private key; the public one is written beside it as .pub")

    serve.add(commands)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
    parser.set_defaults(command=run, config=None)
    return parser


def _signing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--key", metavar="FILE", type=Path, required=required, help="the private key, in PEM")
    parser.add_argument("--key-id", metavar="ID", default="release-1", help="default: release-1")
    parser.add_argument("--algorithm", choices=_ALGORITHMS)
    parser.add_argument("--scope", default="sidecar", help="what the bundle is for (default: sidecar)")


def _build(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build, signature  # noqa: PLC0415  other commands need none of it

    if arguments.may_return_to and arguments.return_until is None:
        raise OperatorFault("--may-return-to needs --return-until: a permission to go back has an end")
    sources = build.Sources(
        policies=arguments.policy or build.library(), overlays=once("--overlay", arguments.overlay), data=arguments.data,
        compile_rbac=arguments.compile_rbac,
    )  # fmt: skip
    stamp = build.Stamp(
        revision=arguments.revision, serial=arguments.serial,
        created=time.time() if arguments.created is None else arguments.created,
        may_return_to=arguments.may_return_to, return_until=arguments.return_until,
    )  # fmt: skip
    key = (
        signature.private_key(arguments.key, key_id=arguments.key_id, algorithm=arguments.algorithm)
        if arguments.key
        else None
    )
    bundle = build.build(opa_binary(), sources, stamp)
    if key is not None:
        bundle = signature.sign(bundle, key, arguments.scope)
    build.written(arguments.output, bundle)
    for line in _summary(bundle):
        print(line)
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build, signature  # noqa: PLC0415

    key = signature.private_key(arguments.key, key_id=arguments.key_id, algorithm=arguments.algorithm)
    bundle = signature.sign(_read(arguments.bundle), key, arguments.scope)
    build.written(arguments.output or arguments.bundle, bundle)
    print(f"signed {arguments.output or arguments.bundle} with {key.id} ({key.algorithm}) for scope {arguments.scope}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import release, signature  # noqa: PLC0415

    keys = {name: _key(*key) for name, key in once("--key", arguments.key).items()}
    bundle = _read(arguments.bundle)
    try:
        key_id = signature.verify(bundle, keys, arguments.scope)
        said = release.release(bundle)
    except OperatorFault as fault:
        raise OperatorFault(f"{arguments.bundle}: {fault}", code=fault.code) from fault
    print(
        f"{arguments.bundle}: signed with {key_id} for scope {arguments.scope}; revision {said.revision}, serial {said.serial}"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import canonical, signature  # noqa: PLC0415

    bundle = _read(arguments.bundle)
    if arguments.json:
        try:
            manifest = json.loads(canonical.encode(bundle.manifest))
        except ValueError as error:  # a number of thousands of digits
            raise OperatorFault(f"{arguments.bundle}: {error}", code="bundle_malformed") from error
        told = {
            "digest": signature.content_digest(bundle), "signed": bundle.signatures is not None,
            "manifest": manifest,
            "files": {name: signature.digest(name, content) for name, content in sorted(bundle.files.items())},
        }  # fmt: skip
        print(json.dumps(told, indent=2))
        return 0
    for line in _summary(bundle):
        print(harmless(line))  # nobody vouches for it
    for name, content in sorted(bundle.files.items()):
        print(f"  {len(content):>9,}  {name}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import signature  # noqa: PLC0415

    old, new = _read(arguments.old), _read(arguments.new)
    if signature.content_digest(old) == signature.content_digest(new):
        print("no difference")
        return 0
    for name in sorted(old.files.keys() | new.files.keys()):
        before, after = old.files.get(name), new.files.get(name)
        told = False
        for line in difflib.unified_diff(
            _lines(name, before), _lines(name, after), f"{arguments.old}:{name}", f"{arguments.new}:{name}", lineterm=""
        ):
            told = True
            print(harmless(line))
        if not told and before is None:
            print(f"{name} is new, and empty")
        elif not told and after is None:
            print(f"{name} is gone, and was empty")
        elif not told and before is not None and after is not None and before != after:
            print(f"{name} differs in bytes that are no text")
    return 1


def _keygen(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build  # noqa: PLC0415

    public = arguments.private.with_name(f"{arguments.private.stem}.pub")
    build.key_pair(arguments.private, public)
    print(f"{arguments.private}: keep it where releases are made; {public}: list it under policy.keys")
    return 0


def _summary(bundle: Bundle) -> Iterator[str]:
    from sidecar.bundles import release, signature  # noqa: PLC0415

    yield f"digest   {signature.content_digest(bundle)}, {'signed' if bundle.signatures else 'not signed'}"
    try:
        said = release.release(bundle)
    except OperatorFault as fault:
        yield f"release  none that a sidecar takes: {fault}"
        return
    yield f"revision {said.revision}, serial {said.serial}, roots {', '.join(said.roots)}"
    if said.may_return_to:
        yield f"return   to {', '.join(map(str, sorted(said.may_return_to)))}"
    for name, proof in said.cache.items():
        read = ", ".join(".".join(("input", *path)) for path in proof.fields) or "nothing of the input"
        yield f"cache    {name}: {f'pure, reads {read}' if proof.pure else 'not proven pure'}"


def _lines(name: str, content: bytes | None) -> list[str]:
    """Text to compare: JSON is laid out, since what is on one line would differ as a whole."""
    from sidecar.bundles import canonical  # noqa: PLC0415

    if not content:
        return []
    if name.endswith((".json", ".manifest")):
        return list(_laid_out(canonical.parse(content)))
    return content.decode("utf-8", "surrogateescape").split("\n")


def _laid_out(value: Value, at: str = "", end: str = "") -> Iterator[str]:
    """JSON with a line for each value, keys sorted, and each number as it is spelt: `1e3` is not signed as `1000`."""
    from sidecar.bundles import canonical  # noqa: PLC0415

    if not value or not isinstance(value, (dict, list)):
        yield f"{at}{canonical.encode(value).decode()}{end}"
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    inner = " " * (len(at) - len(at.lstrip()) + 2)
    yield f"{at}{opening}"
    items: list[tuple[str, Value]] = (
        [(f"{inner}{json.dumps(key)}: ", value[key]) for key in sorted(value)]
        if isinstance(value, dict)
        else [(inner, one) for one in value]
    )
    for index, (start, one) in enumerate(items, 1):
        yield from _laid_out(one, start, "," if index < len(items) else "")
    yield f"{inner[2:]}{closing}{end}"


def _read(path: Path) -> Bundle:
    from sidecar.cli import files  # noqa: PLC0415

    try:
        return files.read_bundle(path)
    except OperatorFault as fault:
        raise OperatorFault(f"{path}: {fault}", code=fault.code) from fault


def _key(path: Path, algorithm: str) -> VerifyingKey:
    from sidecar.cli import files  # noqa: PLC0415
    from sidecar.config import PolicyKey  # noqa: PLC0415

    try:
        return files.check_key(PolicyKey(algorithm=algorithm, file=path))
    except OperatorFault as fault:
        raise OperatorFault(f"{path}: {fault}", code=fault.code) from fault


def opa_binary() -> Path:
    from sidecar.decision import install  # noqa: PLC0415

    opa = install.find()
    if opa is None:
        raise OperatorFault("OPA is not installed; run `sidecar opa install`", code="opa_missing")
    return opa


def pair(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise argparse.ArgumentTypeError("must be TEAM=DIR")
    return name, Path(path)


def once(option: str, pairs: Sequence[tuple[str, T]]) -> dict[str, T]:
    """What an option that may be repeated gave. Of two with one name the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise OperatorFault(f"{option} is given twice for the same name", code="arguments_contradictory")
    return found


def _public(text: str) -> tuple[str, tuple[Path, str]]:
    name, sign, rest = text.partition("=")
    path, colon, algorithm = rest.rpartition(":")
    if not colon or algorithm not in _ALGORITHMS:
        path, algorithm = rest, "ES256"
    if not sign or not name or not path:
        raise argparse.ArgumentTypeError("must be ID=FILE or ID=FILE:ALGORITHM")
    return name, (Path(path), algorithm)


def _serial(text: str) -> int:
    if not text.isdecimal() or not text.isascii() or int(text) > (1 << 53) - 1:
        raise argparse.ArgumentTypeError("must be a whole number")
    return int(text)


def _time(text: str) -> float:
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be a time of RFC 3339") from error
    if at.tzinfo is None:
        raise argparse.ArgumentTypeError("must have an offset, such as Z")
    return at.timestamp()
