"""The report is one file, and numbers of unlike protocols never share a chart."""

import datetime
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.evaluation.chart import chart
from pipeline.evaluation.report import render
from pipeline.evaluation.report_data import Curve, Point, ReportData, Section, Sheet, _sections
from pipeline.tracking import Checkpoint

SVG = "{http://www.w3.org/2000/svg}"
NOW = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)


def curve(run: str, values: Mapping[int, float], spread: float = 0.0) -> Curve:
    return Curve(
        run=run,
        points=[
            Point(step=step, value=value, interval=(value - spread, value + spread) if spread else None, note="")
            for step, value in values.items()
        ],
    )


def section(identity: str, curves: Sequence[Curve], **protocol: Any) -> Section:
    record = {"metric": "fid", "num_images": 2000, **protocol}
    unlike = ["num_images is 2000 and 500"] if protocol else []
    return Section(identity=identity, metric="fid", protocol=record, unlike_first=unlike, curves=curves)


def page(*sections: Section, sheets: Sequence[Sheet] = (), champion: str | None = None) -> str:
    data = ReportData(
        experiment="<ddpm>", num_checkpoints=4, num_pending=1, sections=sections, sheets=sheets, champion=champion
    )
    return render(data, now=NOW)


class Reader(HTMLParser):
    """Tags with their attributes, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_other_file() -> None:
    text = page(
        section("a" * 16, [curve("run", {10: 5.0, 20: 4.0})]), sheets=[Sheet(run="run", step=20, png=b"\x89PNG")]
    )
    reader = Reader(text)
    assert reader.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    sources = [attributes["src"] for _, attributes in reader.tags if "src" in attributes]
    assert sources == ["data:image/png;base64,iVBORw=="]
    assert "url(" not in text
    assert "@import" not in text


def test_unlike_protocols_have_a_chart_each_and_what_differs_is_named() -> None:
    text = page(
        section("a" * 16, [curve("run", {10: 5.0})]), section("b" * 16, [curve("run", {10: 50.0})], num_images=500)
    )
    assert text.count("<svg") == 2
    assert text.count("Not comparable with the first fid, whose protocol differs: num_images is 2000 and 500") == 1


def published(step: int, *results: Mapping[str, Any]) -> Checkpoint:
    tags = {f"protocol.{place}": json.dumps(result) for place, result in enumerate(results)}
    return Checkpoint(model_id=str(step), step=step, run_id="0", run_name="run", artifact_uri="", tags=tags)


def test_distances_come_first_with_their_intervals_and_scores_are_ranked_the_other_way_round() -> None:
    base = {"num_images": 200, "note": "the bias is large"}

    def results(step: int) -> list[dict[str, Any]]:
        value = 100.0 / step
        around = {"fid": value, "fid_low": value - 1, "fid_high": value + 1}
        return [
            {
                "protocol": {**base, "metric": "precision_inception", "settings": "k = 3"},
                "metrics": {"precision_inception": step / 100, "recall_inception": 0.5},
            },
            {"protocol": {**base, "metric": "fid", "settings": "jackknife", "code": "later"}, "metrics": around},
            {"protocol": {**base, "metric": "fid"}, "metrics": {"fid": value}},
        ]

    distance, precision = _sections([published(step, *results(step)) for step in (20, 10)])
    assert (distance.metric, distance.note, distance.unlike_first) == ("fid", "the bias is large", [])
    assert [(point.step, point.interval) for _, point in distance.best] == [(20, (4.0, 6.0)), (10, (9.0, 11.0))]
    assert (precision.metric, precision.note) == ("precision_inception", "")
    assert [(point.value, point.others) for _, point in precision.best] == [
        (0.2, {"recall_inception": 0.5}),
        (0.1, {"recall_inception": 0.5}),
    ]


def test_what_a_person_named_is_text_and_not_markup() -> None:
    text = page(section("a" * 16, [curve("<b>&run", {10: 5.0})]), champion="<i>best</i>")
    assert "<b>&run" not in text
    assert "&lt;b&gt;&amp;run" in text
    assert "&lt;i&gt;best&lt;/i&gt;" in text
    assert "Evaluation of &lt;ddpm&gt;" in text


def test_an_experiment_without_results_says_what_to_do() -> None:
    assert "run <code>jobs/evaluate.py --pending</code>" in page()


def test_the_best_checkpoints_come_first() -> None:
    found = section("a" * 16, [curve("one", {10: 5.0, 20: 4.0}), curve("two", {10: 4.5})])
    assert [(run, point.step) for run, point in found.best] == [("one", 20), ("two", 10), ("one", 10)]


def circles(svg: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}circle")
    return [(float(circle.get("cx", "")), float(circle.get("cy", ""))) for circle in found]


def test_a_chart_puts_larger_steps_to_the_right_and_smaller_distances_lower() -> None:
    svg = chart([curve("run", {10: 5.0, 20: 4.0, 40: 4.5})], title="fid")
    (x1, y1), (x2, y2), (x3, y3) = circles(svg)
    assert x1 < x2 < x3
    assert (x3 - x2) == pytest.approx(2 * (x2 - x1), abs=0.3)
    assert y1 < y3 < y2
    assert "log scale" not in svg


def test_distances_of_different_size_get_a_logarithmic_axis() -> None:
    svg = chart([curve("run", {1: 1000.0, 2: 100.0, 3: 10.0})], title="fid")
    (_, y1), (_, y2), (_, y3) = circles(svg)
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.3)
    assert "fid (log scale)" in svg


@pytest.mark.parametrize("values", [{10: 5.0}, {10: 0.0}, {10: 0.0, 20: 0.0}, {0: 1e-9, 1: 3e5}])
def test_a_chart_of_few_or_odd_numbers_is_still_a_chart(values: Mapping[int, float]) -> None:
    for x, y in circles(chart([curve("run", values)], title="fid")):
        assert 0 <= x <= 860
        assert 0 <= y <= 380


def test_intervals_are_drawn_where_they_are_known() -> None:
    with_bars = chart([curve("run", {10: 5.0, 20: 4.0}, spread=0.5)], title="fid")
    assert len(list(ElementTree.fromstring(with_bars).iter(f"{SVG}path"))) == 2
    assert "<path" not in chart([curve("run", {10: 5.0, 20: 4.0})], title="fid")
