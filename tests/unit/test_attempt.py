"""What is worked out before anybody is asked: how many requests a bucket has tokens for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.attempt import Bucket
from sidecar.config import Rate
from sidecar.errors import RateLimited


def taken(bucket: Bucket, *times: float) -> list[bool]:
    results = []
    for now in times:
        try:
            bucket.take(now)
        except RateLimited:
            results.append(False)
        else:
            results.append(True)
    return results


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate():
    bucket = Bucket(Rate(per_second=2.0, burst=3))
    assert taken(bucket, 100.0, 100.0, 100.0, 100.0) == [True, True, True, False]
    assert taken(bucket, 100.4, 100.5, 100.6, 101.0) == [False, True, False, True]


def test_a_bucket_holds_no_more_than_its_burst_however_long_nobody_came():
    bucket = Bucket(Rate(per_second=1000.0, burst=2))
    assert taken(bucket, 0.0, 1000.0, 1000.0, 1000.0) == [True, True, True, False]


@pytest.mark.parametrize(("per_second", "wait"), [(0.1, 10.0), (2.0, 0.5)])
def test_whoever_gets_no_token_is_told_when_there_is_one(per_second, wait):
    bucket = Bucket(Rate(per_second=per_second, burst=1))
    bucket.take(0.0)
    with pytest.raises(RateLimited) as limited:
        bucket.take(0.0)
    assert limited.value.retry_after == pytest.approx(wait)
    assert (limited.value.status, limited.value.code) == (429, "rate_limited")
    bucket.take(wait)


@given(
    rate=st.builds(Rate, per_second=st.floats(0.01, 1000), burst=st.integers(1, 50)),
    steps=st.lists(st.floats(0, 10), max_size=100),
)
def test_no_stretch_of_time_gets_more_than_burst_and_rate_allow(rate, steps):
    bucket, now, times = Bucket(rate), 0.0, []
    for step in steps:
        now += step
        if taken(bucket, now) == [True]:
            times.append(now)
    for first in range(len(times)):
        for last in range(first, len(times)):
            allowed = rate.burst + (times[last] - times[first]) * rate.per_second
            assert last - first + 1 <= allowed + 1e-4
