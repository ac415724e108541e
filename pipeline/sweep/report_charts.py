"""The charts of a sweep's report. One schedule has one colour and one shape in all of them."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.charts.axis import decimals_for, number
from pipeline.charts.dots import Dot, Row, dot_chart, row_chart
from pipeline.charts.heat import Cell, heat_map
from pipeline.charts.lines import Line, Mark, line_chart
from pipeline.charts.page import figures
from pipeline.sweep.report_data import Points, SweepReport, TrialReport, describe, short
from pipeline.sweep.schedule_curves import ScheduleCurve, schedule_curve

__all__ = ["MOST_ROWS", "cost", "curves", "dashes", "grid", "knobs", "mean_of", "rungs", "sampling", "schedules"]
__all__ += ["seeds", "tones"]

_NUM_NAMED = 6
"""Lines of this many trials, the best, have names; the others stay in the background."""
MOST_ROWS = 40
_MOST_T = 3
"""Drawn schedules: the smallest, a middle and the largest T."""
_WIDE, _NARROW = 980, 400


def tones(report: SweepReport) -> dict[str, int]:
    """The colour of each schedule, in alphabetical order, so that it does not depend on who won."""
    names = sorted({str(trial.knobs.get("schedule", "")) for trial in report.trials})
    return {name: place for place, name in enumerate(names)}


def tone(report: SweepReport, trial: TrialReport) -> int:
    """The colour of a trial."""
    return tones(report)[str(trial.knobs.get("schedule", ""))]


def both(chart: Callable[[int], str]) -> str:
    """A chart as wide as the page, and the same for a page as narrow as a telephone; the style shows one of them."""
    return f"<figure><div class='wide'>{chart(_WIDE)}</div><div class='narrow'>{chart(_NARROW)}</div></figure>"


def grid(report: SweepReport) -> str:
    """The objective by schedule and T; empty unless two combinations were tried."""
    groups: dict[tuple[str, str], list[TrialReport]] = {}
    for trial in report.trials:
        groups.setdefault((str(trial.knobs.get("schedule", "-")), str(trial.knobs.get("T", "-"))), []).append(trial)
    if len(groups) < 2:
        return ""
    best = next(iter(report.ranked), None)
    decimals = decimals_for([trial.mean for trial in report.ranked if trial.mean is not None])
    cells = {place: _cell(report, trials, best, decimals) for place, trials in groups.items()}
    schedules = sorted({schedule for schedule, _ in groups})
    Ts = sorted({T for _, T in groups}, key=lambda T: (len(T), T))
    return heat_map(schedules, Ts, cells, row_name="schedule", column_name="T, steps of the forward process")


def _cell(report: SweepReport, trials: Sequence[TrialReport], best: TrialReport | None, decimals: int) -> Cell:
    """The best of the trials that share a schedule and T. They come in the order of their means."""
    first = trials[0]
    among = f"best of {len(trials)}" if len(trials) > 1 else ""
    if first.mean is None:
        step = max((run.last_step or 0 for run in first.runs), default=0)
        words = f"at step {step:,}" if first.status == "stopped" and step else ""
        return Cell(text=first.status, note=words, state="failed" if first.status == "failed" else "stopped")
    spread = "" if first.error is None else f"\N{PLUS-MINUS SIGN} {number(first.error, decimals)}"
    count = f"{len(first.values)} of {len(first.runs)} seeds" if len(first.values) < len(first.runs) else ""
    if not count and report.num_seeds > 1:
        count = f"{len(first.values)} seed{'s' if len(first.values) > 1 else ''}"
    note = ", ".join(word for word in (spread, count, among) if word)
    return Cell(text=number(first.mean, decimals), note=note, value=first.mean, is_best=first is best)


def knobs(report: SweepReport) -> str:
    """The objective against each searched knob but the schedule, a small chart for each."""
    names = [name for name in report.varying() if name != "schedule"]
    return figures([chart for name in names if (chart := _knob(report, name))])


def _knob(report: SweepReport, name: str) -> str:
    trials = [trial for trial in report.ranked if trial.knobs.get(name) is not None]
    values = [trial.knobs[name] for trial in trials]
    if len({str(value) for value in values}) < 2:
        return ""
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    dots = [
        Dot(
            x=value if is_numeric else short(value),
            y=trial.mean or 0.0,
            name=trial.words,
            tone=tone(report, trial),
            error=trial.error,
            is_best=trial is report.ranked[0],
        )
        for trial, value in zip(trials, values, strict=True)
    ]
    x_log = is_numeric and min(values) > 0 and max(values) >= 5 * min(values)
    return dot_chart(dots, x_name=_UNITS.get(name, name), y_name=report.metric, x_log=x_log)


_UNITS = {"T": "T, steps", "beta_start": "beta_start (at T = 1000)", "beta_end": "beta_end (at T = 1000)"}


def curves(report: SweepReport) -> str:
    """The objective against the step, a line for each run; empty unless a run was measured twice."""
    return _history(report, report.metric, lambda run: run.curve)


def rungs(report: SweepReport) -> str:
    """What early stopping saw: the objective on fewer images."""
    return _history(report, f"{report.metric} on fewer images", lambda run: run.rungs)


def _history(report: SweepReport, y_name: str, points_of: Callable[[Any], Points]) -> str:
    named = {trial.key for trial in report.trials[:_NUM_NAMED]}
    lines = []
    for trial in reversed(report.trials):
        found = [(run, points_of(run)) for run in trial.runs if points_of(run)]
        for place, (run, points) in enumerate(found):
            is_named = trial.key in named
            seed = f" seed {run.seed}" if len(trial.runs) > 1 else ""
            lines.append(
                Line(
                    name=f"{trial.words}{seed}",
                    marks=[Mark(x=step, y=value) for step, value in points],
                    tone=tone(report, trial) if is_named else None,
                    label=trial.words if is_named and place == 0 else "",
                    weight="thick" if trial is report.trials[0] else "normal" if is_named else "thin",
                    is_dotted=is_named,
                    end=run.status if run.status in ("stopped", "failed") else "",
                )
            )
    if max((len(line.marks) for line in lines), default=0) < 2:
        return ""
    levels = [mark.y for line in lines for mark in line.marks]
    # The end of the curves is what counts, and a fast start would press it flat.
    y_log = min(levels) > 0 and max(levels) > 3 * min(levels)
    return both(
        lambda width: line_chart(lines, x_name="optimizer step", y_name=y_name, width=width, height=380, y_log=y_log)
    )


def seeds(report: SweepReport) -> str:
    """Every seed's objective with the mean and its standard error, the best trial first."""
    ranked = report.ranked[:MOST_ROWS]
    if not ranked:
        return ""
    decimals = decimals_for([value for trial in ranked for value in trial.values])
    rows = [
        Row(
            name=trial.words,
            values=trial.values,
            mean=trial.mean or 0.0,
            error=trial.error,
            note=number(trial.mean or 0.0, decimals)
            + (f" \N{PLUS-MINUS SIGN} {number(trial.error, decimals)}" if trial.error is not None else ""),
            tone=tone(report, trial),
            is_best=trial is ranked[0],
        )
        for trial in ranked
    ]
    return both(lambda width: row_chart(rows, x_name=report.metric, width=width))


def cost(report: SweepReport) -> str:
    """The objective against the time of a trial; trials that none beats in both have names."""
    timed = [(trial, seconds) for trial in report.ranked if (seconds := mean_of(trial, "seconds")) is not None]
    if len(timed) < 2:
        return ""
    front = [
        trial for place, (trial, seconds) in enumerate(timed) if all(seconds < other for _, other in timed[:place])
    ]
    is_long = max(seconds for _, seconds in timed) > 600
    dots = [
        Dot(
            x=seconds / 60 if is_long else seconds,
            y=trial.mean or 0.0,
            name=trial.words,
            tone=tone(report, trial),
            error=trial.error,
            is_best=trial is report.ranked[0],
            label=trial.words if trial in front else "",
        )
        for trial, seconds in timed
    ]
    x_name = f"time of a trial, {'minutes' if is_long else 'seconds'}"
    return both(lambda width: dot_chart(dots, x_name=x_name, y_name=report.metric, width=width, height=320))


def mean_of(trial: TrialReport, name: str) -> float | None:
    """Mean of a cost over a trial's finished runs."""
    values = [value for run in trial.runs if run.value is not None and (value := getattr(run, name)) is not None]
    return sum(values) / len(values) if values else None


def drawn_Ts(Ts: Sequence[int]) -> list[int]:
    """Which T are drawn, the largest first."""
    return [*Ts][::-1] if len(Ts) <= _MOST_T else [Ts[-1], Ts[len(Ts) // 2], Ts[0]]


def dashes(Ts: Sequence[int]) -> str:
    """Which line of the schedules belongs to which T, in words."""
    words = zip(("Solid", "dashed", "dotted"), drawn_Ts(Ts), strict=False)
    return ", ".join(f"{line} is T = {T:,}" for line, T in words)


def schedules(report: SweepReport) -> str:
    """alpha_bar and log-SNR of the schedules that were tried; those of the best trials above those of others."""
    drawn = drawn_Ts(sorted({trial.knobs["T"] for trial in report.trials if isinstance(trial.knobs.get("T"), int)}))
    found: dict[str, tuple[TrialReport, ScheduleCurve]] = {}
    for trial in report.trials:
        curve = schedule_curve(trial.params)
        shape = describe({name: trial.knobs[name] for name in _SHAPE if name in trial.knobs})
        if curve is not None and shape not in found and (trial.knobs.get("T") in drawn or len(found) == 0):
            found[shape] = (trial, curve)
    if not found:
        return ""
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
                tone=tone(report, trial) if place < 2 * _NUM_NAMED else None,
                dash=(drawn.index(trial.knobs["T"]) if trial.knobs.get("T") in drawn else 0),
                is_dotted=False,
                weight="thick" if place == 0 else "normal" if place < 2 * _NUM_NAMED else "thin",
            )
            for place, (shape, (trial, curve)) in enumerate(found.items())
        ]
        charts.append(
            line_chart(lines[::-1], x_name="t / T", y_name=y_name, width=470, height=320, y_log=False, room=0.0)
        )
    return figures(charts)


_SHAPE = ("schedule", "T", "beta_start", "beta_end", "cosine_s", "max_beta")


def sampling(report: SweepReport) -> str:
    """The sampling search's distances against the number of steps, a line for all that differs otherwise."""
    groups: dict[str, dict[float, float]] = {}
    for result in report.sampled:
        steps = result.knobs.get("sampling_steps")
        if isinstance(steps, int | float):
            rest = {name: value for name, value in result.knobs.items() if name != "sampling_steps"}
            name = " ".join([result.trial, *(short(value) for value in rest.values())])
            groups.setdefault(name, {}).setdefault(float(steps), result.value)
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
    x_name = "sampling steps (network evaluations of an image)"
    return both(
        lambda width: line_chart(lines[::-1], x_name=x_name, y_name=report.metric, width=width, height=340, x_log=True)
    )
