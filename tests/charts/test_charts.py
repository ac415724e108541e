"""Charts as text: axes, marks and labels where they belong, and nothing that a person named is markup."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from pipeline.charts.axis import Axis, decimals_for, number, tick_text
from pipeline.charts.dots import Dot, Row, dot_chart, row_chart
from pipeline.charts.heat import Cell, heat_map
from pipeline.charts.lines import Line, Mark, line_chart
from pipeline.charts.page import Column, document, table
from pipeline.charts.svg import spread, text_width

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str, kind: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [text.text or "" for text in found if kind in text.get("class", "").split()]


@pytest.mark.parametrize(
    ("values", "is_log"),
    [((0.0, 1.0), False), ((-20.0, 10.0), False), ((170.0, 1000.0), True), ((1e-5, 1.0), True), ((3.0, 3.0), True)],
)
def test_ticks_lie_within_their_axis_and_are_told_apart(values: tuple[float, float], is_log: bool) -> None:
    axis = Axis(values, 0, 100, is_log=is_log)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 8
    assert all(0 <= axis.at(tick) <= 100 for tick in ticks)
    assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_a_logarithmic_axis_makes_equal_ratios_equal_distances() -> None:
    axis = Axis((1.0, 100.0), 0, 100, is_log=True)
    assert axis.at(10) - axis.at(1) == pytest.approx(axis.at(100) - axis.at(10), abs=0.2)


def test_numbers_of_a_column_have_the_same_decimals() -> None:
    assert (decimals_for([188.1, 263.2]), decimals_for([2.93]), decimals_for([0.0231]), decimals_for([0.0])) == (
        1,
        3,
        5,
        0,
    )
    assert [number(value, 1) for value in (1234.56, 7.0, -0.04)] == ["1,234.6", "7.0", "0.0"]
    assert [tick_text(value) for value in (1e-5, 0.05, 100, 1000, 20000, 3e6, -10)] == [
        "1e-5", "0.05", "100", "1,000", "20k", "3M", "\N{MINUS SIGN}10",
    ]  # fmt: skip


def test_labels_are_moved_apart_in_their_order_and_stay_within_the_chart() -> None:
    moved = spread([50, 51, 52, 99, 10], gap=15, low=0, high=100)
    order = [moved[place] for place in (4, 0, 1, 2, 3)]
    assert all(later - earlier >= 14.9 for earlier, later in itertools.pairwise(order))
    assert min(moved) >= 0
    assert max(moved) <= 100


def test_more_labels_than_there_is_room_for_share_what_there_is() -> None:
    moved = spread([50.0] * 11, gap=15, low=0, high=100)
    assert (min(moved), max(moved)) == (0, 100)
    assert sorted(moved) == pytest.approx([10.0 * place for place in range(11)])


def test_names_of_lines_fit_into_the_picture_and_are_told_whole_when_pointed_at() -> None:
    name = "a name that is far too long to be written beside a line of a chart" * 3
    svg = line_chart([Line(name=name, label=name, marks=[Mark(x=1, y=2), Mark(x=2, y=1)])], x_name="x", y_name="y")
    (label,) = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if "series" in text.get("class", "")]
    assert float(label.get("x", "")) + text_width(label.text or "") <= 960
    assert [title.text for title in label.iter(f"{SVG}title")] == [name]


def test_tried_values_are_the_ticks_of_an_axis_where_they_have_room() -> None:
    dots = [Dot(x=T, y=float(T), name="") for T in (100, 400, 1000)]
    assert texts(dot_chart(dots, x_name="T", y_name="fid", x_log=True), "tick")[-3:] == ["100", "400", "1,000"]
    crowded = [Dot(x=float(T), y=1.0, name="") for T in range(1, 60)]
    assert len(texts(dot_chart(crowded, x_name="T", y_name="fid"), "tick")) < 20


def test_words_make_an_axis_as_well() -> None:
    dots = [Dot(x=word, y=1.0, name="") for word in ("eps", "v", "eps")]
    assert texts(dot_chart(dots, x_name="prediction", y_name="fid"), "tick")[-2:] == ["eps", "v"]


@pytest.mark.parametrize("width", [400, 960])
def test_a_row_shows_every_seed_the_mean_and_its_error(width: int) -> None:
    rows = [Row(name="cosine", values=[1.0, 2.0, 3.0], mean=2.0, error=0.58, note="2.00")]
    root = ElementTree.fromstring(row_chart(rows, x_name="fid", width=width))
    kinds = [element.get("class", "").split()[0] for element in root if element.get("class")]
    assert (kinds.count("mark"), kinds.count("mean"), kinds.count("band")) == (3, 1, 1)


def colours(page: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, found)) for found in re.findall(r"background:rgb\((\d+),(\d+),(\d+)\)", page)]


def test_a_smaller_number_has_a_darker_cell() -> None:
    values = [1.0, 2.0, 3.0, 5.0, 8.0]
    cells = {("row", str(value)): Cell(text=str(value), value=value) for value in values}
    page = heat_map(["row"], [str(value) for value in values], cells, row_name="", column_name="")
    lightness = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue in colours(page)]
    assert len(lightness) == 5
    assert lightness == sorted(lightness)


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_number_of_every_cell_can_be_read() -> None:
    """WCAG 2 asks for a contrast of 4.5."""
    values = [1 + place / 50 for place in range(51)]
    cells = {("row", str(value)): Cell(text=str(value), value=value) for value in values}
    page = heat_map(["row"], [str(value) for value in values], cells, row_name="", column_name="")
    inks = [luminance((255, 255, 255) if ink == "fff" else (17, 17, 17)) for ink in re.findall(r"color:#(\w+)'", page)]
    grounds = [luminance(colour) for colour in colours(page)]
    contrasts = [(max(a, b) + 0.05) / (min(a, b) + 0.05) for a, b in zip(inks, grounds, strict=True)]
    assert len(contrasts) == 51
    assert min(contrasts) >= 4


def test_cells_without_a_number_say_why_and_have_no_colour() -> None:
    page = heat_map(["a"], ["1", "2"], {("a", "1"): Cell(text="failed", state="failed")}, row_name="", column_name="")
    assert "class='failed'" in page
    assert "class='none'" in page
    assert colours(page) == []


def test_what_a_person_named_is_text_and_not_markup() -> None:
    evil = "<u>&\"'"
    parts = [
        line_chart([Line(name=evil, label=evil, marks=[Mark(x=1, y=1)])], x_name=evil, y_name=evil),
        dot_chart([Dot(x=evil, y=1.0, name=evil, label=evil)], x_name=evil, y_name=evil),
        row_chart([Row(name=evil, values=[1.0], mean=1.0, error=None, note=evil)], x_name=evil),
        heat_map(
            [evil], [evil], {(evil, evil): Cell(text=evil, note=evil, value=1.0)}, row_name=evil, column_name=evil
        ),
        table([Column(name=evil)], [[evil]], caption=evil),
        document(evil, header="", body=""),
    ]
    assert [place for place, part in enumerate(parts) if "<u>&" in part or "&lt;u&gt;&amp;" not in part] == []
    for svg in parts[:3]:
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
