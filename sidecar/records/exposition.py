"""Prometheus' text format 0.0.4: families of samples as values, and the text that a scraper gets of them.

Our own, since the client library has to import a web server, a mail parser and a registry to write some lines (3 MiB in each
worker); tests read what is written here with that library's parser. Pure.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text-based format).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[str, ...]


class Sample(NamedTuple):
    """One line. `suffix` follows the family's name: `_total`, `_bucket`, or nothing."""

    suffix: str
    labels: tuple[tuple[str, str], ...]
    value: float


class Family(NamedTuple):
    """All series of one name. That of a counter is given without `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    samples: Sequence[Sample]


def counter(name: str, meaning: str, labels: Labels, values: Mapping[Labels, float]) -> Family:
    """`values`: one for each of the label, in the order of `labels`; `{(): value}` where there are none."""
    return Family(name, "counter", meaning, [Sample("_total", _named(labels, key), values[key]) for key in values])


def gauge(name: str, meaning: str, labels: Labels, values: Mapping[Labels, float]) -> Family:
    return Family(name, "gauge", meaning, [Sample("", _named(labels, key), values[key]) for key in values])


def histogram(
    name: str,
    meaning: str,
    labels: Labels,
    bounds: Sequence[float],
    values: Iterable[tuple[Labels, Sequence[int], float]],
) -> Family:
    """`bounds` are the upper ones of the buckets; of each series the labels, the counts by bucket (one more than there are bounds)
    and the sum of all that was observed.
    """
    limits = (*map(_number, bounds), "+Inf")
    samples: list[Sample] = []
    for key, counts, total in values:
        named = _named(labels, key)
        reached = 0
        for limit, reached in zip(limits, accumulate(counts), strict=True):
            samples.append(Sample("_bucket", (*named, ("le", limit)), reached))
        samples += (Sample("_count", named, reached), Sample("_sum", named, total))
    return Family(name, "histogram", meaning, samples)


def text(families: Iterable[Family]) -> bytes:
    """The whole answer to a scraper."""
    lines: list[str] = []
    for family in families:
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        meaning = family.meaning.replace("\\", r"\\").replace("\n", r"\n")
        lines += (f"# HELP {name} {meaning}\n", f"# TYPE {name} {family.kind}\n")
        for sample in family.samples:
            shown = ",".join(f'{label}="{_escaped(value)}"' for label, value in sample.labels)
            lines.append(f"{family.name}{sample.suffix}{f'{{{shown}}}' if shown else ''} {_number(sample.value)}\n")
    return "".join(lines).encode("utf-8", "replace")


def _named(labels: Labels, values: Labels) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(zip(labels, values, strict=True)))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    """As Go reads it (`strconv.ParseFloat`)."""
    number = float(value)
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    return "NaN" if math.isnan(number) else repr(number)
