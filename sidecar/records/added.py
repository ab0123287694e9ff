"""What several processes have counted, as if it had been one: families of samples, added up. Pure.

Counters, the buckets and sums of histograms, and gauges of how much there is now are added, series by series. Three are not:
when the sidecar began is when its first process did, and how many descriptors a process may have is what the one that may
have the fewest may have. Who has ended counts for ever with what he had counted (`ended`), or a counter would go down, and
has nothing any more of what there is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from sidecar.records.exposition import Family, Sample

_NOT_ADDED: Mapping[str, Callable[[float, float], float]] = {
    "process_start_time_seconds": min,
    "process_max_fds": min,
}
_Series = tuple[str, tuple[tuple[str, str], ...]]


def added(parts: Iterable[Iterable[Family]]) -> list[Family]:
    """One family of each name, in the order in which names first come."""
    families: dict[str, tuple[Family, dict[_Series, float]]] = {}
    for part in parts:
        for family in part:
            _, values = families.setdefault(family.name, (family, {}))
            join = _NOT_ADDED.get(family.name)
            for sample in family.samples:
                series = (sample.suffix, sample.labels)
                before = values.get(series)
                if before is None:
                    values[series] = sample.value
                else:
                    values[series] = before + sample.value if join is None else join(before, sample.value)
    return [
        family._replace(samples=[Sample(suffix, labels, value) for (suffix, labels), value in values.items()])
        for family, values in families.values()
    ]


def ended(families: Iterable[Family]) -> list[Family]:
    """What stays of a process that is no more."""
    return [family for family in families if family.kind != "gauge"]


def as_json(families: Iterable[Family]) -> list[object]:
    return [[one.name, one.kind, one.meaning, [list(sample) for sample in one.samples]] for one in families]


def from_json(written: Sequence[Sequence[object]]) -> list[Family]:
    """Raises ValueError or TypeError for what `as_json` has not made."""
    return [_family(*one) for one in written]


def _family(name: object, kind: object, meaning: object, samples: object) -> Family:
    if kind not in ("counter", "gauge", "histogram") or not isinstance(samples, list):
        raise ValueError("no family of samples")
    return Family(str(name), kind, str(meaning), [_sample(*one) for one in samples])


def _sample(suffix: str, labels: Sequence[tuple[str, str]], value: float) -> Sample:
    return Sample(str(suffix), tuple((str(name), str(of)) for name, of in labels), float(value))
