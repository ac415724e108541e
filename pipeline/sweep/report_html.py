"""The answer of a sweep as one HTML page that needs no other file, neither scripts nor the network."""

import datetime
import html
from dataclasses import replace

from pipeline.charts.axis import decimals_for, number
from pipeline.charts.page import document, key, picture, section
from pipeline.sweep import report_charts as charts
from pipeline.sweep import report_lines as lines
from pipeline.sweep import report_tables as tables
from pipeline.sweep.answer import Sheet, SweepReport
from pipeline.sweep.report_data import collect
from pipeline.tracking import Tracker

__all__ = ["render", "sweep_report"]


def sweep_report(tracker: Tracker, parent_run_id: str, *, by_itself: bool = False) -> str:
    """The report on a sweep as HTML; ``by_itself`` at its end, when its run is still open. Raises as ``collect``."""
    report = collect(tracker, parent_run_id)
    if by_itself:
        report = replace(report, status="FINISHED")
    return render(report, now=datetime.datetime.now().astimezone())


def render(report: SweepReport, *, now: datetime.datetime) -> str:
    """The page: the answer first, then what it rests on."""
    shown = key([(name, tone) for name, tone in charts.tones(report).items()])
    metric = report.metric
    body = [
        section("Schedule and T", charts.grid(report), lead=_grid_lead(report)),
        section("Samples", _sheets(report), lead="The same noise for both: what differs is the model."),
        section(_seeds_title(report), charts.seeds(report), lead=_seeds_lead(report)),
        section("One knob at a time", _with(shown, charts.knobs(report)), lead=_KNOBS_LEAD.format(metric=metric)),
        section("While training", lines.curves(report), lead=_CURVES_LEAD),
        section("Early stopping", lines.rungs(report), lead=_RUNGS_LEAD),
        section("Cost", _with(shown, charts.cost(report)) + tables.costs(report), lead=_COST_LEAD),
        section("The noise schedules", lines.schedules(report), lead=_SCHEDULES_LEAD if report.ranked else ""),
        section("Sampling without training again", tables.sampled(report), lead=_SAMPLING_LEAD),
        section("Failed and stopped", tables.unfinished(report)),
        section(f"Refused: {len(report.refused)}", tables.refused(report), lead=_REFUSED_LEAD),
        section("Protocol", tables.protocol(report), lead=_PROTOCOL_LEAD),
        section("Files and commands", tables.commands(report)),
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
    "How fast an image turns into noise. The best trial's schedule is the thickest line. Each is drawn at its largest "
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
            (
                "Time of all runs",
                tables.clock(seconds),
                "hours:minutes:seconds" if seconds >= 3600 else "minutes:seconds",
            )
        )
    return facts


def _grid_lead(report: SweepReport) -> str:
    mean = ", mean over seeds \N{PLUS-MINUS SIGN} standard error" if report.num_seeds > 1 else ""
    if not report.ranked:
        return "No trial has a value."
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
