"""The answer of a sweep as one HTML page that needs no other file, neither scripts nor the network."""

import base64
import datetime
import html
from collections.abc import Sequence

from pipeline.charts.axis import decimals_for, number
from pipeline.charts.page import Column, document, key, picture, section, table
from pipeline.sweep import report_charts as charts
from pipeline.sweep.report_data import Sheet, SweepReport, TrialReport, collect, short
from pipeline.tracking import Tracker

__all__ = ["render", "sweep_report"]

_MOST_ROWS = 60
_MOST_SAMPLED = 15


def sweep_report(tracker: Tracker, parent_run_id: str) -> str:
    """The report on a sweep as HTML. Raises as ``collect``."""
    return render(collect(tracker, parent_run_id), now=datetime.datetime.now().astimezone())


def render(report: SweepReport, *, now: datetime.datetime) -> str:
    """The page: the answer first, then what it rests on."""
    shown = key([(name, tone) for name, tone in charts.tones(report).items()])
    metric = report.metric
    body = [
        section("Schedule and T", charts.grid(report), lead=_grid_lead(report)),
        section("Samples", _sheets(report), lead="The same noise for both: what differs is the model."),
        section(_seeds_title(report), charts.seeds(report), lead=_seeds_lead(report)),
        section("One knob at a time", _with(shown, charts.knobs(report)), lead=_KNOBS_LEAD.format(metric=metric)),
        section("While training", charts.curves(report), lead=_CURVES_LEAD),
        section("Early stopping", charts.rungs(report), lead=_RUNGS_LEAD),
        section("Cost", _with(shown, charts.cost(report)) + _costs(report), lead=_COST_LEAD),
        section("The noise schedules", charts.schedules(report), lead=_SCHEDULES_LEAD),
        section("Sampling without training again", _sampled(report), lead=_SAMPLING_LEAD),
        section("Failed and stopped", _unfinished(report)),
        section(f"Refused: {len(report.refused)}", _refused(report), lead=_REFUSED_LEAD),
        section("Protocol", _protocol(report), lead=_PROTOCOL_LEAD),
        section("Files and commands", _commands(report)),
    ]
    return document(f"Sweep {report.name}", header=_header(report, now), body="".join(body))


_KNOBS_LEAD = "{metric} of every trial (mean over its seeds) against what was searched; a ring marks the best trial."
_CURVES_LEAD = (
    "Each line is a trial (mean over its seeds), measured at its checkpoints by the same protocol. The best have "
    "names; a cross marks one that ended before its last step."
)
_RUNGS_LEAD = "Runs were stopped early by a distance on fewer images, which is larger than that of the final protocol."
_COST_LEAD = "Time is that of one run, training and evaluation together."
_SCHEDULES_LEAD = (
    "How fast an image turns into noise; the thickest line is the best trial's schedule. Each is drawn at its largest "
    "T: betas are scaled by 1000/T, so that other T follow nearly the same line."
)
_SAMPLING_LEAD = (
    "The checkpoints of the trials, sampled in other ways. Each row has a protocol of its own: compare models within "
    "equal knobs, and knobs within one model."
)
_REFUSED_LEAD = "Combinations that break the betas or leave signal in x_T; no trial was started for them."
_PROTOCOL_LEAD = "What every number above depends on beside the weights. Unlike protocols must not be compared."


def _header(report: SweepReport, now: datetime.datetime) -> str:
    is_open = report.status in ("RUNNING", "SCHEDULED")
    words = report.verdict or _no_verdict(report)
    note = "The sweep had not ended when this was written. " if is_open else ""
    lead = f"{note}Experiment {report.experiment}, written {now:%Y-%m-%d %H:%M %Z}"
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"{f'<small>{html.escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in _facts(report)
    )
    return (
        f"<h1>Sweep {html.escape(report.name)}</h1><p class='lead'>{html.escape(lead)}</p>"
        f"<p class='verdict{' open' if is_open or not report.ranked else ''}'>{html.escape(words)}</p>"
        f"<dl class='facts'>{facts}</dl>"
    )


def _no_verdict(report: SweepReport) -> str:
    if report.ranked:
        return f"No verdict yet: {len(report.ranked)} of {len(report.trials)} trials have a result."
    return "No trial has finished." if report.trials else "No trial was started."


def _facts(report: SweepReport) -> list[tuple[str, str, str]]:
    runs = [run for trial in report.trials for run in trial.runs]
    counts = [
        f"{count} {status}"
        for status in ("finished", "stopped", "failed", "running")
        if (count := sum(trial.status == status for trial in report.trials))
    ]
    counts += [f"{len(report.refused)} refused"] if report.refused else []
    seconds = sum(run.seconds or 0.0 for run in runs)
    images = [run.images for run in runs if run.images is not None and run.value is not None]
    facts = []
    if report.ranked:
        best = report.ranked[0]
        decimals = decimals_for([trial.mean for trial in report.ranked if trial.mean is not None])
        spread = "" if best.error is None else f" \N{PLUS-MINUS SIGN} {number(best.error, decimals)}"
        value = number(best.mean or 0.0, decimals)
        facts.append((f"Best {report.metric}", value + spread, f"{best.words}; smaller is better"))
    facts.append(("Trials", str(len(report.trials)), ", ".join(counts)))
    more = "no spread is known" if report.num_seeds < 2 else f"{len(runs)} runs in all"
    facts.append(("Seeds of a trial", str(report.num_seeds), more))
    if images:
        same = min(images) == max(images)
        words = "the same for all finished runs" if same else f"to {max(images):,.0f}: not the same for all runs"
        facts.append(("Training images of a run", f"{min(images):,.0f}", words))
    if seconds:
        facts.append(
            ("Time of all runs", _clock(seconds), "hours:minutes:seconds" if seconds >= 3600 else "minutes:seconds")
        )
    return facts


def _grid_lead(report: SweepReport) -> str:
    mean = ", mean over seeds \N{PLUS-MINUS SIGN} standard error" if report.num_seeds > 1 else ""
    others = [name for name in report.varying() if name not in ("schedule", "T")]
    best = f"; each cell is its best trial over {' and '.join(others)}" if others else ""
    return f"{report.metric}{mean}: darker is better{best}."


def _seeds_title(report: SweepReport) -> str:
    return "Spread of the seeds" if report.num_seeds > 1 else "All trials"


def _seeds_lead(report: SweepReport) -> str:
    left = len(report.ranked) - charts.MOST_ROWS
    more = f" The {charts.MOST_ROWS} best of {len(report.ranked)} trials." if left > 0 else ""
    if report.num_seeds < 2:
        return f"One seed each, so nothing says how much of a difference is chance; --seeds 3 would.{more}"
    return f"A mark is a seed, a stroke the mean of a trial, the band its standard error.{more}"


def _with(shown: str, chart: str) -> str:
    return shown + chart if chart else ""


def _sheets(report: SweepReport) -> str:
    pairs = [("Best", report.best_sheet), ("Worst", report.worst_sheet)]
    pictures = "".join(_sheet(report, words, sheet) for words, sheet in pairs if sheet is not None)
    return f"<div class='pair'>{pictures}</div>" if pictures else ""


def _sheet(report: SweepReport, words: str, sheet: Sheet) -> str:
    seed = f", seed {sheet.run.seed}" if report.num_seeds > 1 else ""
    decimals = decimals_for([sheet.run.value or 0.0])
    value = f"{report.metric} {number(sheet.run.value or 0.0, decimals)}"
    return picture(
        sheet.png,
        alt=f"samples of the {words.lower()} trial",
        caption=f"{words}: {sheet.trial.words}{seed}, step {sheet.step:,}, {value}",
    )


def _costs(report: SweepReport) -> str:
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
    images, seconds = charts.mean_of(trial, "images"), charts.mean_of(trial, "seconds")
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
        "\N{EN DASH}" if seconds is None else _clock(seconds),
    ]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _sampled(report: SweepReport) -> str:
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
    return charts.sampling(report) + table(columns, rows, best=0, caption=caption)


def _is_numeric(report: SweepReport, name: str) -> bool:
    return all(isinstance(result.knobs.get(name, 0), int | float) for result in report.sampled)


def _unfinished(report: SweepReport) -> str:
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


def _refused(report: SweepReport) -> str:
    rows = report.refused[:_MOST_ROWS]
    left = len(report.refused) - len(rows)
    columns = [Column(name="combination"), Column(name="why")]
    return table(columns, rows, caption=f"and {left} more" if left else "") if rows else ""


def _protocol(report: SweepReport) -> str:
    if not report.identity:
        return ""
    note = report.protocol.get("note")
    warning = f"<p class='unlike'>{html.escape(str(note))}.</p>" if note else ""
    rows: list[Sequence[str]] = [["identity", report.identity]]
    rows += [[name, str(value)] for name, value in report.protocol.items() if name != "note"]
    return warning + table([Column(name="field"), Column(name="value", is_code=True)], rows)


def _commands(report: SweepReport) -> str:
    parts = []
    if report.csv:
        encoded = base64.b64encode(report.csv.encode()).decode()
        file = f"{report.name}.csv"
        parts.append(
            f"<p><a download='{html.escape(file)}' href='data:text/csv;base64,{encoded}'>All trials as CSV</a>"
            f"{_location(report.csv_location)}</p>"
        )
    for command in report.commands:
        lines = html.escape("\n".join(command.lines))
        parts.append(f"<h3>{html.escape(command.purpose)}</h3><pre>{lines}</pre>")
    return "".join(parts)


def _location(location: str) -> str:
    shown = html.escape(location)
    if location.startswith(("http://", "https://")):
        return f", in MLflow: <a href='{shown}'>sweep.csv</a>"
    return f", in MLflow&rsquo;s store: <code>{shown}</code>" if location else ""
