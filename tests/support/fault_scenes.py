"""The scenes that faults are enumerated over."""

from __future__ import annotations

from support.fault_stage import Scene, Stage

_HELLO = b"hello, who is there?"


async def _get(stage: Stage) -> None:
    await stage.h1().ask("GET", "/g1")


async def _again(stage: Stage) -> None:
    await stage.h1().ask("GET", "/again")


async def _post(stage: Stage) -> None:
    await stage.h1().ask("POST", "/p1", _HELLO)


async def _kept(stage: Stage) -> None:
    """The second request finds both connections kept, the third only that to the upstream."""
    line = stage.h1()
    await line.ask("GET", "/k1")
    await line.ask("GET", "/k2")
    await stage.h1().ask("POST", "/k3", _HELLO)


async def _large(stage: Stage) -> None:
    await stage.h1().ask("GET", "/large")


async def _h2_get(stage: Stage) -> None:
    await stage.h2().ask(("GET", "/g1", None))


async def _h2_again(stage: Stage) -> None:
    await stage.h2().ask(("GET", "/again", None))


async def _h2_post(stage: Stage) -> None:
    await stage.h2().ask(("POST", "/p1", _HELLO))


async def _h2_two(stage: Stage) -> None:
    await stage.h2().ask(("GET", "/s1", None), ("POST", "/s2", _HELLO))


async def _h2_kept(stage: Stage) -> None:
    line = stage.h2()
    await line.ask(("GET", "/k1", None))
    await line.ask(("GET", "/k2", None))
    await stage.h2().ask(("POST", "/k3", _HELLO))


async def _grpc(stage: Stage) -> None:
    await stage.h2().ask(("POST", "/pkg.Service/One", _HELLO), grpc=True)


async def _grpc_kept(stage: Stage) -> None:
    line = stage.h2()
    await line.ask(("POST", "/pkg.Service/One", _HELLO), ("POST", "/pkg.Service/Two", _HELLO), grpc=True)
    await line.ask(("POST", "/pkg.Service/Three", _HELLO), grpc=True)


async def _grpc_again(stage: Stage) -> None:
    await stage.h2().ask(("POST", "/pkg.Service/Again", _HELLO), grpc=True)


async def _tunnel(stage: Stage) -> None:
    await stage.h1().tunnel("/t1")


async def _h2_tunnel(stage: Stage) -> None:
    await stage.h2().tunnel("/t1")


SCENES: tuple[Scene, ...] = (
    Scene("h1 in, GET", "inbound", _get, _again),
    Scene("h1 in, POST", "inbound", _post, _again),
    Scene("h1 in, kept", "inbound", _kept, _again),
    Scene("h1 in, large", "inbound", _large, _again),
    Scene("h1 in, tunnel", "inbound", _tunnel, _again),
    Scene("h2 in, GET", "inbound", _h2_get, _h2_again, client="h2"),
    Scene("h2 in, POST", "inbound", _h2_post, _h2_again, client="h2"),
    Scene("h2 in, two streams", "inbound", _h2_two, _h2_again, client="h2", abreast=2, independent=True),
    Scene("h2 in, kept", "inbound", _h2_kept, _h2_again, client="h2"),
    Scene("h2 in, gRPC to h2c", "inbound", _grpc_kept, _grpc_again, client="h2", upstream="h2", abreast=2),
    Scene("h2 in, tunnel to h1", "inbound", _h2_tunnel, _h2_again, client="h2"),
    Scene("h1 out, GET", "outbound", _get, _again),
    Scene("h1 out, POST", "outbound", _post, _again),
    Scene("h1 out, kept", "outbound", _kept, _again),
    Scene("h1 out, tunnel", "outbound", _tunnel, _again),
    Scene("h1 out, kept h2", "outbound", _kept, _again, upstream="h2"),
    Scene("h1 out, tunnel to h2", "outbound", _tunnel, _again, upstream="h2"),
    Scene("h2c out, GET", "outbound", _h2_get, _h2_again, client="h2", upstream="h2"),
    Scene("h2c out, gRPC", "outbound", _grpc, _grpc_again, client="h2", upstream="h2"),
    Scene("h2c out, two streams", "outbound", _h2_two, _h2_again, client="h2", upstream="h2", abreast=2),
    Scene("h2c out, tunnel", "outbound", _h2_tunnel, _h2_again, client="h2", upstream="h2"),
    Scene("h2c out, kept h1", "outbound", _h2_kept, _h2_again, client="h2"),
    Scene("h1 out, plaintext near", "outbound", _get, _again, plaintext=True),
)
