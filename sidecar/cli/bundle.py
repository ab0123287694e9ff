"""`sidecar bundle …`: make, sign, verify, look at and compare bundles; nothing here is asked for a request."""

from __future__ import annotations

import argparse
import difflib
import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.errors import OperatorFault

if TYPE_CHECKING:
    from sidecar.bundles.archive import Bundle
    from sidecar.bundles.signature import VerifyingKey


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("bundle", help="build, sign, verify, inspect and compare policy bundles")
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
    parser.add_argument("--algorithm", choices=("ES256", "ES384", "ES512", "EdDSA", "RS256", "RS384", "RS512"))
    parser.add_argument("--scope", default="sidecar", help="what the bundle is for (default: sidecar)")


def _build(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build, signature  # noqa: PLC0415  other commands need none of it

    if arguments.may_return_to and arguments.return_until is None:
        raise OperatorFault("--may-return-to needs --return-until: a permission to go back has an end")
    sources = build.Sources(
        policies=arguments.policy or build.library(), overlays=dict(arguments.overlay), data=arguments.data
    )
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

    keys: dict[str, VerifyingKey] = {}
    for name, path, algorithm in arguments.key:
        try:
            keys[name] = signature.public_key(algorithm, path.read_bytes())
        except OSError as error:
            raise OperatorFault(f"{path}: {error.strerror}") from error
        except OperatorFault as fault:
            raise OperatorFault(f"{path}: {fault}") from fault
    bundle = _read(arguments.bundle)
    key_id = signature.verify(bundle, keys, arguments.scope)
    said = release.release(bundle)
    print(
        f"{arguments.bundle}: signed with {key_id} for scope {arguments.scope}; revision {said.revision}, serial {said.serial}"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import signature  # noqa: PLC0415

    bundle = _read(arguments.bundle)
    if arguments.json:
        told = {
            "digest": signature.content_digest(bundle), "signed": bundle.signatures is not None,
            "manifest": json.loads(bundle.files.get(".manifest", b"{}")),
            "files": {name: signature.digest(name, content) for name, content in sorted(bundle.files.items())},
        }  # fmt: skip
        print(json.dumps(told, indent=2))
        return 0
    for line in _summary(bundle):
        print(line)
    for name, content in sorted(bundle.files.items()):
        print(f"  {len(content):>9,}  {name}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    old, new = _read(arguments.old), _read(arguments.new)
    differs = False
    for name in sorted(old.files.keys() | new.files.keys()):
        for line in difflib.unified_diff(
            _lines(name, old.files.get(name)), _lines(name, new.files.get(name)),
            f"{arguments.old}:{name}", f"{arguments.new}:{name}", lineterm="",
        ):  # fmt: skip
            differs = True
            print(line)
    if not differs:
        print("no difference")
    return int(differs)


def _keygen(arguments: argparse.Namespace) -> int:
    from sidecar.bundles import build  # noqa: PLC0415

    public = arguments.private.with_suffix(".pub")
    build.key_pair(arguments.private, public)
    print(f"{arguments.private}: keep it where releases are made; {public}: list it under policy.keys")
    return 0


def _summary(bundle: Bundle) -> Iterator[str]:
    from sidecar.bundles import release, signature  # noqa: PLC0415

    said = release.release(bundle)
    yield f"revision {said.revision}, serial {said.serial}, roots {', '.join(said.roots)}"
    yield f"digest   {signature.content_digest(bundle)}, {'signed' if bundle.signatures else 'not signed'}"
    if said.may_return_to:
        yield f"return   to {', '.join(map(str, sorted(said.may_return_to)))}"
    for name, proof in said.cache.items():
        read = ", ".join(".".join(("input", *path)) for path in proof.fields) or "nothing of the input"
        yield f"cache    {name}: {f'pure, reads {read}' if proof.pure else 'not proven pure'}"


def _lines(name: str, content: bytes | None) -> list[str]:
    """Text to compare: JSON is laid out, since what is on one line would differ as a whole."""
    if content is None:
        return []
    if name.endswith((".json", ".manifest")):
        return json.dumps(json.loads(content), indent=2, sort_keys=True).splitlines()
    return content.decode("utf-8", "replace").splitlines()


def _read(path: Path) -> Bundle:
    from sidecar.bundles import archive  # noqa: PLC0415

    try:
        return archive.read(path.read_bytes())
    except OSError as error:
        raise OperatorFault(f"{path}: {error.strerror}") from error
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


def _public(text: str) -> tuple[str, Path, str]:
    name, sign, rest = text.partition("=")
    path, _, algorithm = rest.partition(":")
    if not sign or not name or not path:
        raise argparse.ArgumentTypeError("must be ID=FILE or ID=FILE:ALGORITHM")
    return name, Path(path), algorithm or "ES256"


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
