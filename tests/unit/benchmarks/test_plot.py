import xml.etree.ElementTree as ET
from typing import Any

import pytest

from benchmarks.plot import Axis, growth, ratios

PEERS = {"envoy": "Envoy", "nginx_njs": "nginx"}


def elements(picture: str, name: str) -> list[ET.Element]:
    return ET.fromstring(picture).findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def ratio(median: float) -> dict[str, Any]:
    return {"cpu_us": {"median": median, "low": median / 2, "high": median * 2}}


def test_an_axis_is_logarithmic_and_nothing_leaves_it() -> None:
    axis = Axis(low=0.1, high=10, start=100, end=300)
    assert [axis.at(value) for value in (0.1, 1, 10)] == pytest.approx([100, 200, 300])
    assert [axis.at(value) for value in (0, 1e9)] == pytest.approx([100, 300])


def test_each_case_with_figures_has_a_row_and_each_of_its_peers_a_mark_at_its_median() -> None:
    bench = {
        "one": {"ratios": {"envoy": ratio(0.5), "nginx_njs": ratio(1.0), "nginx": ratio(9.0)}},
        "two": {"ratios": {"envoy": ratio(2.0)}},
        "broken": {"failed": "why"},
    }
    picture = ratios(bench, ["one", "two", "broken", "absent"], PEERS, "cpu_us", "a < b")
    names = [element.text for element in elements(picture, "text")]
    assert "one" in names
    assert "broken" not in names
    circles = [float(element.attrib["cx"]) for element in elements(picture, "circle")][1:]  # the first is the legend's
    squares = elements(picture, "polygon")[1:]
    assert (len(circles), len(squares)) == (2, 1)
    assert circles[0] < circles[1]
    assert ET.fromstring(picture).attrib["aria-label"] == "a < b"


def test_without_figures_there_is_a_picture_all_the_same() -> None:
    assert elements(ratios({}, ["one"], PEERS, "cpu_us", "t"), "circle")
    assert elements(growth([]), "text")


def point(curve: str, number: int, load: str = "distinct", peer: str = "sidecar") -> dict[str, Any]:
    return {"curve": curve, "number": number, "peer": peer, "load": load, "cpu_us": 10.0 * number, "rss_mib": 40.0}


def test_each_curve_is_a_line_through_its_points() -> None:
    points = [
        *(point("callers", number) for number in (1, 100, 10_000)),
        point("connections", 16, "cached"), point("connections", 16, "cached", "envoy"),
        {"curve": "rules_compiled", "number": 100_000, "failed": "why"},
    ]  # fmt: skip
    lines = [element.attrib["points"].split() for element in elements(growth(points), "polyline")]
    assert sorted(len(line) for line in lines if line) == [1, 1, 1, 1, 3, 3]
    climbing = next(line for line in lines if len(line) == 3)
    heights = [float(place.partition(",")[2]) for place in climbing]
    assert heights == sorted(heights, reverse=True)  # y grows downward
    assert "10k" in [element.text for element in elements(growth(points), "text")]
