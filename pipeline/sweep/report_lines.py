"""The line charts of a sweep's report: curves of training, of the sampling search, and of the noise schedules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.charts.lines import Line, Mark, line_chart
from pipeline.charts.page import figures, key, line_key
from pipeline.sweep.answer import Points, SeedRun, SweepReport, TrialReport, describe, short
from pipeline.sweep.report_charts import NARROW, WIDE, tone
from pipeline.sweep.schedule_curves import ScheduleCurve, schedule_curve

__all__ = ["curves", "rungs", "sampling", "schedules"]

_NUM_NAMED = 6
"""Lines of this many trials, the best, have names; the others stay in the background."""
_MOST_SHAPES = 12
"""Schedules with a colour; beyond it they stay in the background."""


def curves(report: SweepReport) -> str:
    """The objective against the step, a line for each run; empty unless a run was measured twice."""
    return _history(report, report.metric, lambda run: run.curve)


def rungs(report: SweepReport) -> str:
    """What early stopping saw: the objective on fewer images."""
    return _history(report, f"{report.metric} on fewer images", lambda run: run.rungs)


def _history(report: SweepReport, y_name: str, points_of: Callable[[SeedRun], Points]) -> str:
    named = {trial.key for trial in report.trials[:_NUM_NAMED]}
    lines = []
    for trial in report.trials:
        is_named = trial.key in named
        marks = _mean_curve([dict(points_of(run)) for run in _longest(trial)])
        if marks:
            line = Line(
                name=trial.words,
                marks=marks,
                tone=tone(report, trial) if is_named else None,
                label=report.label(trial) if is_named else "",
                weight="thick" if trial is report.trials[0] else "normal" if is_named else "thin",
                is_dotted=is_named,
                end=trial.status if trial.status in ("stopped", "failed") else "",
            )
            lines.append(line)
    if max((len(line.marks) for line in lines), default=0) < 2:
        return ""
    levels = [mark.y for line in lines for mark in line.marks]
    # The end of the curves is what counts, and a fast start would press it flat.
    y_log = min(levels) > 0 and max(levels) > 3 * min(levels)
    return _named_lines(
        lines,
        lambda drawn, width: line_chart(
            drawn[::-1], x_name="optimizer step", y_name=y_name, width=width, height=380, y_log=y_log
        ),
    )


def _longest(trial: TrialReport) -> list[SeedRun]:
    """The runs of a trial whose mean is drawn: finished ones, or all if none has finished."""
    return [run for run in trial.runs if run.value is not None] or list(trial.runs)


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> list[Mark]:
    """The mean at steps that all curves have."""
    curves = [curve for curve in curves if curve]
    steps = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
    return [Mark(x=step, y=sum(curve[step] for curve in curves) / len(curves)) for step in steps]


def schedules(report: SweepReport) -> str:
    """alpha_bar and log-SNR of the schedules that were tried, each at its largest T, the best one thickest."""
    found: dict[str, TrialReport] = {}
    for trial in report.trials:
        shape = describe({name: trial.knobs[name] for name in _SHAPE if name in trial.knobs})
        T = trial.knobs.get("T", 0)
        # The place in the order stays that of the best trial with this shape.
        if shape not in found or found[shape].knobs.get("T", 0) < T:
            found[shape] = trial
    drawn = [(shape, trial, curve) for shape, trial in found.items() if (curve := schedule_curve(trial.params))]
    if not drawn:
        return ""
    dashes = _dashes([str(trial.knobs.get("schedule")) for _, trial, _ in drawn])
    tones = [tone(report, trial) if place < _MOST_SHAPES else None for place, (_, trial, _) in enumerate(drawn)]
    wanted: list[tuple[str, Callable[[ScheduleCurve], Sequence[float]]]] = [
        ("alpha_bar, part of the image's variance that is left", lambda curve: curve.alpha_bar),
        ("log-SNR, natural logarithm", lambda curve: curve.log_snr),
    ]
    charts = []
    for y_name, values_of in wanted:
        lines = [
            Line(
                name=shape,
                marks=[Mark(x=u, y=value) for u, value in zip(curve.u, values_of(curve), strict=True)],
                tone=tones[place],
                dash=dashes[place],
                is_dotted=False,
                weight="thick" if place == 0 and report.ranked else "thin" if tones[place] is None else "normal",
            )
            for place, (shape, _, curve) in enumerate(drawn)
        ]
        charts.append(
            line_chart(lines[::-1], x_name="t / T", y_name=y_name, width=470, height=320, y_log=False, room=0.0)
        )
    names = [(shape, tones[place], dashes[place]) for place, (shape, _, _) in enumerate(drawn[:_MOST_SHAPES])]
    others: list[tuple[str, int | None, int]] = [("others", None, 0)] if len(drawn) > _MOST_SHAPES else []
    return line_key([*names, *others]) + figures(charts)


def _dashes(schedules: Sequence[str]) -> list[int]:
    """The first line of each schedule is solid, the next dashed, then dotted."""
    return [schedules[:place].count(schedule) for place, schedule in enumerate(schedules)]


_SHAPE = ("schedule", "beta_start", "beta_end", "cosine_s", "max_beta")


def sampling(report: SweepReport) -> str:
    """The sampling search's distances against the number of steps, a line for all that differs otherwise."""
    groups: dict[str, dict[float, float]] = {}
    varying = {name for name in report.sampled_knobs() if len({str(r.knobs.get(name)) for r in report.sampled}) > 1}
    for result in report.sampled:
        steps = result.knobs.get("sampling_steps")
        if isinstance(steps, int | float):
            rest = {name: result.knobs[name] for name in result.knobs if name in varying and name != "sampling_steps"}
            words = [
                short(value) if isinstance(value, str) else f"{name}={short(value)}" for name, value in rest.items()
            ]
            groups.setdefault(" ".join([result.trial, *words]), {}).setdefault(float(steps), result.value)
    if max(map(len, groups.values()), default=0) < 2:
        return ""
    by_best = sorted(groups, key=lambda name: min(groups[name].values()))
    lines = [
        Line(
            name=name,
            marks=[Mark(x=steps, y=value) for steps, value in sorted(groups[name].items())],
            tone=place if place < _NUM_NAMED else None,
            label=name if place < _NUM_NAMED else "",
            weight="thick" if place == 0 else "normal" if place < _NUM_NAMED else "thin",
            is_dotted=place < _NUM_NAMED,
        )
        for place, name in enumerate(by_best)
    ]
    x_name = "sampling steps, network evaluations"
    return _named_lines(
        lines,
        lambda drawn, width: line_chart(
            drawn[::-1], x_name=x_name, y_name=report.metric, width=width, height=340, x_log=True
        ),
    )


def _named_lines(lines: Sequence[Line], chart: Callable[[Sequence[Line], int], str]) -> str:
    """A chart of lines with their names; on a narrow page with numbers, whose names are listed below."""
    numbers = {line.label: str(place + 1) for place, line in enumerate(line for line in lines if line.label)}
    numbered = [replace(line, label=numbers.get(line.label, "")) for line in lines]
    listed = [(f"{numbers[line.label]} {line.name}", line.tone or 0) for line in lines if line.label]
    narrow = f"{chart(numbered, NARROW)}{key(listed, is_list=True)}"
    return f"<figure><div class='wide'>{chart(lines, WIDE)}</div><div class='narrow'>{narrow}</div></figure>"
