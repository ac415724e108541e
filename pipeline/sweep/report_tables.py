"""The tables of a sweep's report, and what can be typed next."""

import base64
import html
from collections.abc import Sequence

from pipeline.charts.axis import decimals_for, number
from pipeline.charts.page import Column, table
from pipeline.sweep.answer import SweepReport, TrialReport, short
from pipeline.sweep.report_charts import mean_of
from pipeline.sweep.report_lines import sampling

__all__ = ["clock", "commands", "costs", "protocol", "refused", "sampled", "unfinished"]

_MOST_ROWS = 60
_MOST_SAMPLED = 15
_MOST_SHOWN = 140
"""Characters of an address that is a link anyway."""


def costs(report: SweepReport) -> str:
    """All trials that have a value, with what they cost."""
    if not report.ranked:
        return ""
    columns = [Column(name="#", is_number=True), Column(name="trial"), Column(name=report.metric, is_number=True)]
    if report.num_seeds > 1:
        columns += [Column(name="\N{PLUS-MINUS SIGN} std. error", is_number=True), Column(name="seeds", is_number=True)]
    columns += [Column(name=name, is_number=True) for name in ("behind the best", "images of a run", "time, min:s")]
    rows = [_cost_row(report, place, trial) for place, trial in enumerate(report.ranked[:_MOST_ROWS])]
    left = len(report.ranked) - len(rows)
    caption = f"and {left} more in {report.csv_location or 'the CSV file'}" if left else ""
    return "<h3>All finished trials</h3>" + table(columns, rows, best=0, caption=caption)


def _cost_row(report: SweepReport, place: int, trial: TrialReport) -> list[str]:
    decimals = decimals_for([trial.mean for trial in report.ranked if trial.mean is not None])
    best, mean = report.ranked[0].mean or 0.0, trial.mean or 0.0
    images, seconds = mean_of(trial, "images"), mean_of(trial, "seconds")
    done, tried = len(trial.values), len(trial.runs)
    spread = [
        "\N{EN DASH}" if trial.error is None else number(trial.error, decimals),
        str(done) if done == tried else f"{done} of {tried}",
    ]
    return [
        str(place + 1),
        trial.words,
        number(mean, decimals),
        *(spread if report.num_seeds > 1 else []),
        "\N{EN DASH}" if place == 0 or best <= 0 else f"{mean / best - 1:.1%}",
        "\N{EN DASH}" if images is None else f"{images:,.0f}",
        "\N{EN DASH}" if seconds is None else clock(seconds),
    ]


def sampled(report: SweepReport) -> str:
    if not report.sampled:
        return ""
    names = report.sampled_knobs()
    decimals = decimals_for([result.value for result in report.sampled])
    columns = [
        Column(name="trained model"),
        *(Column(name=name, is_number=_is_numeric(report, name)) for name in names),
        Column(name=report.metric, is_number=True),
        Column(name="protocol", is_code=True),
    ]
    rows = [
        [
            result.trial + (f" seed {result.seed}" if report.num_seeds > 1 else ""),
            *(short(result.knobs.get(name, "\N{EN DASH}")) for name in names),
            number(result.value, decimals),
            result.identity,
        ]
        for result in report.sampled[:_MOST_SAMPLED]
    ]
    left = len(report.sampled) - len(rows)
    caption = f"and {left} more in sampling_search.json of the trials" if left else ""
    return sampling(report) + table(columns, rows, best=0, caption=caption)


def _is_numeric(report: SweepReport, name: str) -> bool:
    return all(isinstance(result.knobs.get(name, 0), int | float) for result in report.sampled)


def unfinished(report: SweepReport) -> str:
    groups: dict[tuple[str, ...], list[int]] = {}
    for trial in report.trials:
        for run in trial.runs:
            if run.status != "finished":
                step = "\N{EN DASH}" if run.last_step is None else f"{run.last_step:,}"
                why = run.error or ("by early stopping" if run.status == "stopped" else "\N{EN DASH}")
                groups.setdefault((trial.words, run.status, step, why), []).append(run.seed)
    rows = [
        [words, ", ".join(map(str, seeds)), status, step, why]
        for (words, status, step, why), seeds in list(groups.items())[:_MOST_ROWS]
    ]
    left = len(groups) - len(rows)
    columns = [
        Column(name="trial"),
        Column(name="seeds"),
        Column(name="how it ended"),
        Column(name="last measured step", is_number=True),
        Column(name="why"),
    ]
    return table(columns, rows, caption=f"and {left} more" if left else "") if rows else ""


def refused(report: SweepReport) -> str:
    rows = report.refused[:_MOST_ROWS]
    left = len(report.refused) - len(rows)
    columns = [Column(name="combination"), Column(name="why")]
    return table(columns, rows, caption=f"and {left} more" if left else "") if rows else ""


def protocol(report: SweepReport) -> str:
    if not report.identity:
        return ""
    note = report.protocol.get("note")
    warning = f"<p class='unlike'>{html.escape(str(note))}.</p>" if note else ""
    rows: list[Sequence[str]] = [["identity", report.identity]]
    rows += [[name, str(value)] for name, value in report.protocol.items() if name != "note"]
    return warning + table([Column(name="field"), Column(name="value", is_code=True)], rows)


def commands(report: SweepReport) -> str:
    parts = []
    if report.csv:
        encoded = base64.b64encode(report.csv.encode()).decode()
        file = f"{report.name}.csv"
        parts.append(
            f"<p><a download='{html.escape(file)}' href='data:text/csv;base64,{encoded}'>All trials as CSV</a>"
            f"{_location(report.csv_location)}</p>"
        )
    for command in report.commands:
        lines = "\n".join(map(_line, command.lines))
        parts.append(f"<h3>{html.escape(command.purpose)}</h3><pre>{lines}</pre>")
    return "".join(parts)


def _line(text: str) -> str:
    """What can be typed, or an address that can be followed."""
    shown = html.escape(text)
    return f"<a href='{shown}'>{_shortened(shown)}</a>" if text.startswith(("http://", "https://")) else shown


def _shortened(address: str) -> str:
    return address if len(address) <= _MOST_SHOWN else f"{address[:_MOST_SHOWN]}\N{HORIZONTAL ELLIPSIS}"


def _location(location: str) -> str:
    shown = html.escape(location)
    if location.startswith(("http://", "https://")):
        return f", in MLflow: <a href='{shown}'>sweep.csv</a>"
    return f", in MLflow&rsquo;s store: <code>{shown}</code>" if location else ""


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
