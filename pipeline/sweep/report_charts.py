"""The charts of a sweep's report. One schedule has one colour and one shape in all of them."""

from collections.abc import Callable, Sequence

from pipeline.charts.axis import decimals_for, number
from pipeline.charts.dots import Dot, Row, dot_chart, row_chart
from pipeline.charts.heat import Cell, heat_map
from pipeline.charts.page import figures
from pipeline.sweep.answer import SweepReport, TrialReport, describe, short

__all__ = ["MOST_ROWS", "NARROW", "WIDE", "cost", "grid", "knobs", "mean_of", "seeds", "tone", "tones"]

MOST_ROWS = 40
WIDE, NARROW = 980, 400


def tones(report: SweepReport) -> dict[str, int]:
    """The colour of each schedule, in alphabetical order, so that it does not depend on who won."""
    names = sorted({str(trial.knobs.get("schedule", "")) for trial in report.trials})
    return {name: place for place, name in enumerate(names)}


def tone(report: SweepReport, trial: TrialReport) -> int:
    """The colour of a trial."""
    return tones(report)[str(trial.knobs.get("schedule", ""))]


def both(chart: Callable[[int], str]) -> str:
    """A chart as wide as the page, and the same for a page as narrow as a telephone; the style shows one of them."""
    return f"<figure><div class='wide'>{chart(WIDE)}</div><div class='narrow'>{chart(NARROW)}</div></figure>"


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
    return heat_map(schedules, Ts, cells, row_name="schedule", column_name="T, diffusion steps")


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
            group=describe({other: each for other, each in trial.knobs.items() if other != name}),
        )
        for trial, value in zip(trials, values, strict=True)
    ]
    x_log = is_numeric and min(values) > 0 and max(values) >= 5 * min(values)
    return dot_chart(dots, x_name=_UNITS.get(name, name), y_name=report.metric, x_log=x_log)


_UNITS = {"T": "T, steps", "beta_start": "beta_start (at T = 1000)", "beta_end": "beta_end (at T = 1000)"}


def seeds(report: SweepReport) -> str:
    """Every seed's objective with the mean and its standard error, the best trial first."""
    ranked = report.ranked[:MOST_ROWS]
    if sum(len(trial.values) for trial in ranked) < 2:
        return ""
    decimals = decimals_for([value for trial in ranked for value in trial.values])
    rows = [
        Row(
            name=report.label(trial),
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
            label=report.label(trial) if trial in front else "",
        )
        for trial, seconds in timed
    ]
    x_name = f"time of a trial, {'minutes' if is_long else 'seconds'}"
    caption = "<figcaption>Named trials are the best that their time buys; the ring marks the best of all.</figcaption>"
    return both(lambda width: dot_chart(dots, x_name=x_name, y_name=report.metric, width=width, height=320)) + caption


def mean_of(trial: TrialReport, name: str) -> float | None:
    """Mean of a cost over a trial's finished runs."""
    values = [value for run in trial.runs if run.value is not None and (value := getattr(run, name)) is not None]
    return sum(values) / len(values) if values else None
