"""The plots and pages of reports: well-formed, true to their figures, self-contained."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from anyfp4.tools import report, report_svg

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def test_bars_say_their_numbers() -> None:
    root = parse(report_svg.bars("T <&>", {1: 7, 3: 1}, "x", "y"))
    assert [t.text for t in root.iter(f"{SVG}title")] == ["1: 7", "3: 1"]
    first, second = (r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None)
    assert float(first.attrib["height"]) > float(second.attrib["height"]) > 0
    assert float(first.attrib["x"]) < float(second.attrib["x"])
    assert root.attrib["aria-label"] == "T <&>"


def test_many_bars_become_ranges_that_lose_nothing() -> None:
    counts = {i: i % 5 + 1 for i in range(1, 300)}
    root = parse(report_svg.bars("t", counts, "x", "y"))
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert len(titles) <= 41 and re.fullmatch(r"1 to \d+: \d+", titles[0])
    assert sum(int(t.rpartition(": ")[2]) for t in titles) == sum(counts.values())


def test_histograms_count_everything() -> None:
    values = [0.0, 1e-9, 0.5, 0.5, 2.0, 100.0]
    root = parse(report_svg.histogram("t", values, "x", "y"))
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert sum(int(t.rpartition(": ")[2]) for t in titles) == len(values)


def test_lines_put_points_in_order_and_drop_what_has_no_logarithm() -> None:
    root = parse(report_svg.lines("t", {"a": [(1, 0.1), (2, 0.0), (3, 10.0)]}, "x", "y", log_y=True))
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == 2
    assert float(circles[0].attrib["cx"]) < float(circles[1].attrib["cx"])
    assert float(circles[0].attrib["cy"]) > float(circles[1].attrib["cy"])  # y grows downwards
    inside = (0, report_svg.HEIGHT)
    assert all(inside[0] <= float(c.attrib["cy"]) <= inside[1] for c in circles)


@pytest.mark.parametrize(
    "svg",
    [
        report_svg.bars("t", {}, "x", "y"),
        report_svg.bars("t", {5: 1}, "x", "y"),
        report_svg.histogram("t", [], "x", "y"),
        report_svg.histogram("t", [0.0, 0.0], "x", "y"),
        report_svg.histogram("t", [0.25], "x", "y"),
        report_svg.histogram("t", [1e-300, 1.0, float("inf")], "x", "y"),
        report_svg.lines("t", {}, "x", "y"),
        report_svg.lines("t", {"a": [(0, 0.0)]}, "x", "y", log_y=True),
        report_svg.lines("t", {"a": [(1, 5.0)]}, "x", "y"),
        report_svg.lines("t", {"a": [(1, -5.0), (2, -5.0)]}, "x", "y"),
        report_svg.lines("t", {"a": [(1, 3.0)]}, "x", "y", log_y=True),
        report_svg.lines("t", {"a": [(1, 1e9), (2, 2e-9)], "b": [(1, 7.0)]}, "x", "y", points_only=True),
    ],
)
def test_odd_figures_give_well_formed_plots(svg: str) -> None:
    assert "nan" not in svg.replace("aria", "") and "inf" not in svg
    parse(svg)
    assert len(parse(report_svg.stack([svg, svg])).findall(f"{SVG}svg")) == 2


class Tags(HTMLParser):
    """Checks that tags close in order."""

    VOID = frozenset({"meta", "line", "rect", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_a_page_is_well_formed_and_escapes() -> None:
    plot = report_svg.bars("t", {1: 2}, "x", "y")
    sections = [
        ("a & b", report.table([("<script>", "1")])),
        ("plots", report.plots([plot])),
        (
            "list",
            report.bullets(["<b>"]) + report.folded("more", report.side_by_side([("x", report.table([], ["h"]))])),
        ),
    ]
    html = report.page("T<", "v>", "good", sections)
    parser = Tags()
    parser.feed(html)
    assert parser.open == []
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>" not in html
