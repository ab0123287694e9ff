from dataclasses import replace

import pytest

from benchmarks.books import Account, Own, faults, missing

ENVOY = Account(
    answers=1000, connections=16, asking="repeats", reached=1000, proven=1000, asked=[1000], own=None, names_caller=True
)
OURS = replace(ENVOY, asked=[12], own=Own(decided=1000, repeated=988))
FLOOR = replace(ENVOY, asked=[], proven=0, names_caller=False)
HANDSHAKES = replace(ENVOY, asking="nothing", reached=0, proven=0, asked=[0])
TWO = replace(OURS, asked=[12, 0], own=Own(decided=2000, repeated=1988))
SHARED = replace(OURS, asking="each", asked=[130], own=Own(decided=1000, repeated=0))


@pytest.mark.parametrize(
    "account",
    [
        ENVOY, OURS, FLOOR, HANDSHAKES, TWO, SHARED,
        replace(ENVOY, asked=[1010]),  # a question whether OPA is alive, and those of the warm-up's end
        replace(ENVOY, asked=[1000, 1000]),
        replace(HANDSHAKES, own=Own(decided=0, repeated=0)),
    ],
)  # fmt: skip
def test_what_agrees_is_fair(account: Account) -> None:
    assert list(faults(account)) == []


@pytest.mark.parametrize(
    ("account", "told"),
    [
        (replace(ENVOY, reached=999), "the agent was asked 999 times for 1,000 answers"),
        (replace(FLOOR, reached=0), "the agent was asked 0 times"),
        (replace(ENVOY, proven=999), "told the caller 999 times"),
        (replace(ENVOY, asked=[999]), "OPA decided 999 times"),
        (replace(ENVOY, asked=[1100]), "OPA decided 1,100 times"),
        (replace(ENVOY, asked=[1000, 500]), "OPA decided 500 times"),
        (replace(OURS, asked=[1100]), "OPA decided 1,100 times"),
        (replace(OURS, own=Own(decided=999, repeated=0)), "it made 999 decisions"),
        (replace(OURS, own=Own(decided=2000, repeated=0)), "it made 2,000 decisions"),
        (replace(TWO, own=Own(decided=1000, repeated=900)), "it made 1,000 decisions"),
        (replace(SHARED, own=Own(decided=1000, repeated=100)), "it repeated 100 decisions"),
        (replace(SHARED, asked=[15]), "OPA was queried 15 times"),
        (replace(HANDSHAKES, reached=1), "the agent was asked 1 times for 0 answers"),
        (replace(HANDSHAKES, asked=[100]), "OPA decided 100 times for 0 answers"),
    ],
)
def test_what_does_not_agree_is_told(account: Account, told: str) -> None:
    assert any(told in fault for fault in faults(account))


def test_counts_of_two_proxies_add_up_and_differ_over_time() -> None:
    one, other = Own(decided=5, repeated=3), Own(decided=2, repeated=1)
    assert one + other == Own(decided=7, repeated=4)
    assert one - other == Own(decided=3, repeated=2)


@pytest.mark.parametrize(
    ("lines", "lacking"),
    [([], 101), ([101], 0), ([103], 0), ([100], 1), ([101, 100], 0), ([101, 99], 1), ([90, 100], 11)],
)
def test_what_was_refused_is_in_the_first_log_alone(lines: list[int], lacking: int) -> None:
    assert missing(lines, answers=100, refused=1) == lacking
