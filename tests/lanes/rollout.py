"""Signed policy from a file to a fleet and back, walked whole: every step with what was checked, and how long it took.

    PYTHONPATH=.:tests python -m lanes.rollout

Releases are built and signed with `sidecar bundle`, published to a real `sidecar bundle serve`, and taken by three sidecars
in two rings, each with real OPA and with requests on it all the time (`support.small_fleet`). No answer may ever be another
than the policy that was promoted gives: a candidate that would deny what is allowed is stopped before it denies anything.

From publish to enforced is from before the release is handed to the server, or the order given, until the last sidecar that
it is for has answered a request by it, as its access log has it.
"""

from __future__ import annotations

import argparse
import gzip
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from examples.demo import kit
from sidecar.bundles import signature
from sidecar.decision import install
from support import old_news, small_fleet
from support.bundle_server import SERVER
from support.rollout_walk import PATIENCE, Outcome, Walk
from support.small_fleet import SmallFleet, run

RINGS = [{"name": "canary", "labels": {"ring": "canary"}}, {"name": "all", "percent": 100}]
FORGETFUL = ("/budget/drafts/**",)
"""What the readers of the bad candidate may GET: not what they do GET."""


# ── the steps ─────────────────────────────────────────────────────────────────────────────────────────────────────


def signed(walk: Walk) -> str:
    """Build and sign: the same bytes each time, and nobody else's key"""
    releases, created = walk.fleet.releases, "2031-04-01T08:00:00+00:00"
    once, again = (releases.build(1, name=name, created=created).read_bytes() for name in ("once", "again"))
    assert once == again, "two builds of the same are not the same bytes"
    walk.bundles["r1"] = first = releases.build(1)
    run("bundle", "verify", first, "--key", f"release-1={releases.public}")
    forged = releases.build(1, name="forged", key=releases.strange_key)
    verified = run("bundle", "verify", forged, "--key", f"release-1={releases.public}", check=False)
    assert verified.returncode == 1, "a strange key's signature holds"
    return f"r1 verifies, two builds are {len(once):,} equal bytes, a strange key's is refused"


def served(walk: Walk) -> str:
    """Serve, and start three sidecars that have nothing yet: not ready, and nothing passes"""
    walk.fleet.server.start()
    for name, ring in (("one", "canary"), ("two", "wide"), ("three", "wide")):
        walk.fleet.side(name, walk.agent, {"ring": ring}).start()
    walk.until(lambda: all(side.ready()[0] == 503 for side in walk.sides), lambda: str([s.ready() for s in walk.sides]))
    reasons = {side.ready()[1] for side in walk.sides}
    assert all("bundle" in one for one in reasons), reasons
    assert {walk.fleet.ask(side) for side in walk.sides} == {503}, "without policy there is no decision"
    return f"three wait: {', '.join(sorted(reasons))}; requests are answered 503"


def first(walk: Walk) -> str:
    """Publish the first release and give it to all"""
    assert walk.publish(walk.bundles["r1"], 1)[0] == 201
    walk.order("start", "the first", serial=1, rings=[RINGS[1]])
    walk.until(lambda: all(side.ready()[0] == 200 for side in walk.sides), lambda: str([s.ready() for s in walk.sides]))
    for side in walk.sides:
        walk.fleet.visit(side)
    walk.until(lambda: all(side.runs() == "r1" for side in walk.sides), lambda: "nobody runs r1")
    walk.promotable()
    assert walk.order("promote", "all have it")["state"] == "settled"
    return "three are ready, requests are answered as r1 says"


def canary(walk: Walk) -> str:
    """Start the second at the canary"""
    walk.bundles["r2"] = walk.fleet.releases.build(2, ("/budget/**", "/reports/**"), returns=[1])
    with walk.measured("r2", [walk["one"]]) as took:
        assert walk.publish(walk.bundles["r2"], 2)[0] == 201
        walk.order("start", "readers may read reports", serial=2, rings=RINGS)
    walk.expect(one="r2", two="r1", three="r1")
    walk.until(
        lambda: all((walk.standing()[name]["shadow"] or {}).get("compared") for name in ("two", "three")),
        lambda: f"the others do not compare it: {walk.standing()}",
    )
    assert all(walk.standing()[name]["shadow"]["serial"] == 2 for name in ("two", "three"))
    return f"one runs r2 {took[0] * 1000:.0f} ms after it was handed in; two and three run r1 and compare r2, no differences"


def promoted(walk: Walk) -> str:
    """Promote it to all"""
    walk.promotable()
    with walk.measured("r2", [walk["two"], walk["three"]]) as took:
        walk.order("promote", "the canary is well")
    walk.promotable()
    assert walk.order("promote", "all have it")["state"] == "settled"
    walk.expect(one="r2", two="r2", three="r2")
    return f"all run r2, {took[0] * 1000:.0f} ms after the order"


def stopped(walk: Walk) -> str:
    """A candidate that would deny what is allowed is stopped by what it would have done"""
    walk.bundles["r3"] = walk.fleet.releases.build(3, FORGETFUL, returns=[2])
    answered = walk.fleet.answered
    began = time.monotonic()
    assert walk.publish(walk.bundles["r3"], 3)[0] == 201
    walk.order("start", "fewer may read", serial=3, rings=RINGS, shadow_first=True)
    walk.until(lambda: walk.rollout()["state"] == "halted", lambda: f"it was not halted: {walk.rollout()}")
    took = time.monotonic() - began
    entry = walk.audit()[-1]
    assert (entry["action"], entry["who"]) == ("halt", "gates"), entry
    assert "would have gone the other way under serial 3" in entry["why"], entry
    examples = [one for line in walk.standing().values() for one in (line["shadow"] or {}).get("examples", ())]
    assert {one["path"] for one in examples} == {small_fleet.ALLOWED}, examples
    assert {one["caller"] for one in examples} == {f"spiffe://example.org/{small_fleet.CALLER}"}
    status, said = walk.ordered("promote", "all the same")
    assert (status, said["code"]) == (409, "rollout_conflict"), said
    assert all(by != "r3" for side in walk.sides for _, by, *_ in side.decided()), "r3 decided something"
    walk.expect(one="r2", two="r2", three="r2")
    return (
        f"halted by its gates {took:.1f} s after it was handed in, {examples[0]['path']} named as example; "
        f"{walk.fleet.answered - answered} requests meanwhile, none decided by r3"
    )


def fixed(walk: Walk) -> str:
    """The fixed one, with a higher serial, to the canary and to all"""
    walk.bundles["r4"] = walk.fleet.releases.build(4, ("/budget/**", "/reports/monthly"), returns=[2])
    with walk.measured("r4", [walk["one"]]) as first:
        assert walk.publish(walk.bundles["r4"], 4)[0] == 201
        walk.order("start", "fewer may read, and those who do still may", serial=4, rings=RINGS)
    walk.expect(one="r4", two="r2", three="r2")
    walk.promotable()
    with walk.measured("r4", [walk["two"], walk["three"]]) as then:
        walk.order("promote", "the canary is well")
    walk.promotable()
    assert walk.order("promote", "all have it")["state"] == "settled"
    return f"one runs r4 after {first[0] * 1000:.0f} ms, all {then[0] * 1000:.0f} ms after the promotion"


def rolled_back(walk: Walk) -> str:
    """Roll back, as the signed permission allows"""
    with walk.measured("r2", walk.sides) as took:
        walk.order("rollback", "reports are missed")
    walk.until(
        lambda: all((one["serial"], one["behind"]) == (2, False) for one in walk.standing().values()),
        lambda: str(walk.standing()),
    )
    assert not any(side.events("bundle.refused") for side in walk.sides), "somebody refused it"
    return f"all run r2 again {took[0] * 1000:.0f} ms after the order, and r4 allowed it"


def no_way_back(walk: Walk) -> str:
    """Where the permission does not reach, there is no rollback"""
    walk.bundles["r5"] = walk.fleet.releases.build(5, ("/budget/**", "/reports/**", "/plans/**"))
    with walk.measured("r5", walk.sides) as took:
        assert walk.publish(walk.bundles["r5"], 5)[0] == 201
        walk.order("start", "reports are back", serial=5, rings=[RINGS[1]])
    walk.promotable()
    assert walk.order("promote", "all have it")["state"] == "settled"
    status, said = walk.ordered("rollback", "back to what was")
    assert (status, said["code"]) == (409, "rollout_conflict"), said
    return f"r5 is everywhere after {took[0] * 1000:.0f} ms; its rollback is refused: {said['title']}"


def not_published(walk: Walk) -> str:
    """The server takes no second meaning of a serial, no strange signature, nobody else's order, and goes no serial back"""
    releases, codes = walk.fleet.releases, []
    for bundle, serial, by in (
        (releases.build(2, ("/**",), name="reused"), 2, "ops/release"),
        (releases.build(6, name="forged6", key=releases.strange_key), 6, "ops/release"),
        (releases.build(6, name="unsigned6", key=None), 6, "ops/release"),
        (walk.bundles["r4"], 6, "ops/release"),
        (releases.build(6, name="fine6"), 6, "agent/one"),
    ):
        status, said = walk.publish(bundle, serial, by=by)
        codes.append(f"{status} {said['code']}")
    status, said = walk.ordered("start", "the old one was better", serial=4, rings=RINGS)
    codes.append(f"{status} {said['code']}")
    assert codes == [
        "409 fleet_serial_taken", "422 bundle_signature_invalid", "422 bundle_unsigned", "422 fleet_serial_mismatch",
        "403 policy_denied", "409 rollout_conflict",
    ], codes  # fmt: skip
    return ", ".join(codes)


def unfit(walk: Walk) -> str:
    """Candidates that OPA does not take, or that come to no decision: halted while they are only asked beside"""
    key = signature.private_key(walk.fleet.releases.key, key_id="release-1")
    reasons = []
    for serial, rule, why in (
        (6, b"decision := nobody(1)", "could not activate serial 6"),
        (7, b"decided := true", "would have gone the other way under serial 7"),
    ):
        rego = b"package sidecar.inbound\n\n%b\n" % rule
        assert walk.publish(walk.fleet.site.bundle(serial, signer=key, rego=rego), serial)[0] == 201
        walk.order("start", "made by hand", serial=serial, rings=RINGS, shadow_first=True)
        walk.until(lambda: walk.rollout()["state"] == "halted", lambda: f"it was not halted: {walk.rollout()}")
        entry = walk.audit()[-1]
        assert (entry["who"], why in entry["why"]) == ("gates", True), entry
        reasons.append(entry["why"][:60])
    walk.expect(one="r5", two="r5", three="r5")
    return "; ".join(reasons)


def downgraded(walk: Walk) -> str:
    """Old, reused, cut, unsigned and strange archives in the file that a sidecar reads: each refused, the old one stays"""
    side, releases, source = walk["three"], walk.fleet.releases, walk["three"].directory / "bundle.tar.gz"
    good = walk.bundles["r5"].read_bytes()
    flipped = bytearray(gzip.decompress(good))
    flipped[flipped.index(b"package sidecar") + 3] ^= 1
    kit.write_whole(source, walk.bundles["r2"].read_bytes())
    walk.fleet.restart(side, source=str(source), spiffe_ids=None, shadow=None, report=None)
    walk.refused(side, "bundle_downgrade", "r5", 0)  # what it remembers has survived the restart
    attempts = {
        "bundle_downgrade": walk.bundles["r4"].read_bytes(),
        "bundle_serial_reused": releases.build(5, ("/**",), name="reused5").read_bytes(),
        "bundle_unsigned": releases.build(7, name="unsigned7", key=None).read_bytes(),
        "bundle_scope_mismatch": releases.build(7, name="scope7", scope="elsewhere").read_bytes(),
        "bundle_signature_invalid": releases.build(7, name="forged7", key=releases.strange_key).read_bytes(),
        "bundle_truncated": good[: len(good) // 2],
        "bundle_oversized": gzip.compress(bytes(1 << 30), compresslevel=1),
    }  # fmt: skip
    for code, archive in attempts.items():
        before = len(side.events("bundle.refused"))
        kit.write_whole(source, archive)
        walk.refused(side, code, "r5", before)
    before = len(side.events("bundle.refused"))
    kit.write_whole(source, gzip.compress(bytes(flipped)))
    walk.refused(side, "bundle_signature_invalid", "r5", before)
    return f"after a restart too; {', '.join(attempts)}; r5 decides throughout"


def replayed(walk: Walk) -> str:
    """A server that hands out an old archive, and one that is not ours"""
    side = walk["three"]
    ca = walk.fleet.directory / "ca.pem"
    ca.write_bytes(walk.fleet.site.ca.bundle_pem)
    with old_news.serving(walk.bundles["r1"].read_bytes(), walk.fleet.directory / "old-news", walk.fleet.site.ca) as at:
        url = f"{at}/v1/bundles/sidecar"
        before = len(side.events("bundle.refused"))
        walk.fleet.restart(side, source=url, spiffe_ids=None, ca=str(ca), shadow=None, report=None)
        walk.refused(side, "bundle_downgrade", "r5", before)
        walk.fleet.restart(side, source=url, shadow=None, report=None)
        walk.until(lambda: side.events("bundle.fetch_failed"), lambda: "the stranger was believed")
        told = side.events("bundle.fetch_failed")[-1]
        assert told["reason"].endswith(f"expected {SERVER}"), told
    assert side.runs() == "r5"
    return f"bundle_downgrade; then {told['code']}: it is {told['reason'].partition(': ')[2]}"


def below_the_floor(walk: Walk) -> str:
    """A fresh sidecar, which remembers nothing, has its minimum_serial; back on the server everybody runs the newest"""
    side = walk["three"]
    fresh = walk.fleet.side("fresh", walk.agent, {"ring": "wide"})
    kit.write_whole(fresh.directory / "bundle.tar.gz", walk.bundles["r4"].read_bytes())
    fresh.write(source="bundle.tar.gz", spiffe_ids=None, shadow=None, report=None, minimum_serial=5)
    fresh.start()
    assert fresh.process is not None
    assert fresh.process.wait(PATIENCE) == 1
    told = fresh.events("bundle.refused")
    assert [one["code"] for one in told] == ["bundle_below_minimum"], told
    del walk.fleet.sides["fresh"]
    walk.fleet.restart(side)
    walk.until(lambda: not walk.standing()["three"]["behind"], lambda: str(walk.standing()))
    return "bundle_below_minimum, and it does not start"


def killed(walk: Walk) -> str:
    """Kill the server in the middle of a rollout: sidecars go on, and nothing of it is lost"""
    walk.bundles["r8"] = walk.fleet.releases.build(8, ("/budget/**", "/reports/**"), returns=[5])
    with walk.measured("r8", [walk["one"]]):
        assert walk.publish(walk.bundles["r8"], 8)[0] == 201
        walk.order("start", "no plans", serial=8, rings=RINGS)
    before, audit = walk.rollout(), walk.audit()
    walk.fleet.server.end(signal.SIGKILL)
    answered = walk.fleet.answered
    walk.until(lambda: walk.fleet.answered > answered + 30, lambda: "sidecars stopped with the server")
    walk.fleet.server.start()
    after = walk.rollout()
    assert {**after, "unmet": []} == {**before, "unmet": []}, f"{after}, and it was {before}"
    assert walk.audit() == audit
    walk.promotable()
    walk.order("promote", "goes on")
    walk.until(lambda: all(side.runs() == "r8" for side in walk.sides), lambda: "r8 does not arrive")
    walk.expect(one="r8", two="r8", three="r8")
    return f"{walk.fleet.answered - answered} requests without it; afterwards the rollout goes on, with its {len(audit)} audit entries"


def ended(walk: Walk) -> str:
    """Throughout: no answer but those that promoted policy gives, nothing broken"""
    assert walk.fleet.amiss == [], walk.fleet.amiss[:5]
    assert walk.fleet.defects() == [], walk.fleet.defects()[:5]
    kinds = {(path, status) for side in walk.sides for _, _, path, status in side.decided()}
    assert kinds == {(small_fleet.ALLOWED, 200), (small_fleet.SEALED, 403)}, kinds
    for side in walk.sides:
        side.hush()
    codes = [side.end() for side in walk.sides]
    assert codes == [0] * len(walk.sides), codes
    assert walk.fleet.server.end() == 0
    walk.outcome.answered = walk.fleet.answered
    return f"{walk.fleet.answered:,} requests, each answered as it had to be; all end with 0"


STEPS = (
    signed, served, first, canary, promoted, stopped, fixed, rolled_back, no_way_back, not_published, unfit, downgraded,
    replayed, below_the_floor, killed, ended,
)  # fmt: skip
MAIN_PATH = (signed, served, first, canary, promoted, stopped, fixed, rolled_back, ended)
Step = Callable[[Walk], str]


# ── a walk ────────────────────────────────────────────────────────────────────────────────────────────────────────


def perform(directory: Path, opa: Path, steps: Sequence[Step], *, say: Callable[[str], None]) -> Outcome:
    """Go these steps in an empty directory; the first that fails is the last."""
    outcome, began = Outcome(), time.monotonic()
    with small_fleet.agent() as agent:
        fleet = SmallFleet(directory, opa)
        walk = Walk(fleet=fleet, agent=agent, outcome=outcome)
        try:
            for number, step in enumerate(steps, start=1):
                title, since = step.__doc__ or step.__name__, time.monotonic()
                outcome.steps += 1
                try:
                    checked = step(walk)
                except Exception as error:  # whatever it is, the walk has failed here
                    outcome.complaints.append(f"{title}: {error or type(error).__name__}")
                    say(f"{number:2} FAILED  {title}")
                    break
                say(f"{number:2} {title}\n      {checked} ({time.monotonic() - since:.1f} s)")
        finally:
            fleet.close()
    say(f"walked in {time.monotonic() - began:.0f} s")
    return outcome


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lanes.rollout", description="signed policy from a file to a fleet and back")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="work there, and leave everything for looking at")
    arguments = parser.parse_args()
    opa = install.find()
    if opa is None:
        _say("OPA is not installed: run `sidecar opa install`")
        return 1
    with ExitStack() as stack:
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True)
        directory = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        outcome = perform(directory.absolute(), opa, STEPS, say=_say)
    for complaint in outcome.complaints:
        _say(complaint)
    _say(outcome.summary)
    return 1 if outcome.complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
