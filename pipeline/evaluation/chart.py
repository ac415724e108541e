"""The chart of a report: a distance against the optimizer step."""

from collections.abc import Sequence

from pipeline.charts.lines import Line, Mark, line_chart
from pipeline.charts.svg import NUM_TONES
from pipeline.evaluation.report_data import Curve

__all__ = ["chart"]


def chart(curves: Sequence[Curve], *, title: str) -> str:
    """Distance against step, a line for each run, as an ``<svg>`` element; intervals are bars.

    The distance's axis is logarithmic where the largest is more than ten times the smallest.
    """
    lines = [
        Line(
            name=curve.run,
            marks=[Mark(x=point.step, y=point.value, interval=point.interval) for point in curve.points],
            tone=place,
            dash=place // NUM_TONES,
        )
        for place, curve in enumerate(curves)
    ]
    return line_chart(lines, x_name="optimizer step", y_name=title, width=860)
