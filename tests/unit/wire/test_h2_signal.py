"""What bounds a peer that makes us work for nothing."""

from __future__ import annotations

import pytest
import trio
from h2.exceptions import DenialOfServiceError

from sidecar.wire.h2_signal import Allowance


async def test_limit_is_for_a_time_and_what_is_earned_comes_on_top(autojump_clock):
    allowance = Allowance(10, 5.0)
    for _ in range(10):
        allowance.spend()
    with pytest.raises(DenialOfServiceError):
        allowance.spend()
    allowance = Allowance(10, 5.0)
    allowance.earn(10)
    allowance.earn()
    for _ in range(20):
        allowance.spend()
    with pytest.raises(DenialOfServiceError):
        allowance.spend()


async def test_time_that_passes_forgives(autojump_clock):
    allowance = Allowance(10, 5.0)
    for _ in range(100):
        allowance.spend()
        await trio.sleep(0.6)


async def test_nobody_saves_up_more_than_the_limit(autojump_clock):
    allowance = Allowance(10, 5.0)
    for _ in range(1000):
        allowance.earn(3)
    with pytest.raises(DenialOfServiceError):
        for _ in range(24):
            allowance.spend()
