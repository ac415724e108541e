"""A report on an experiment: one HTML file that needs no other, neither scripts nor the network."""

import datetime
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.charts.page import document, key, picture, section
from pipeline.config import EvaluateConfig
from pipeline.evaluation.champion import registered_name
from pipeline.evaluation.chart import chart
from pipeline.evaluation.report_data import ReportData, Section, Sheet, collect
from pipeline.tracking import Tracker

__all__ = ["Written", "render", "write_report"]

_MOST_ROWS = 10


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a report lies."""

    location: str
    run_id: str
    ui: Sequence[str]
    num_results: int

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {
            "report": self.location,
            "run_id": self.run_id,
            "results": self.num_results,
            "mlflow": self.ui,
            "exit_code": 0,
        }

    def text(self) -> str:
        """Where it lies, for a person."""
        return "\n".join([f"report on {self.num_results} results: {self.location}", *self.ui])


def write_report(config: EvaluateConfig) -> Written:
    """Writes the report on ``config.report`` under ``$DDPM_HOME/reports`` and logs it to the run ``report-EXPERIMENT``.

    Raises:
        UserError: No such experiment, or it has no published checkpoint.
        WorldError: MLflow or storage is away.
    """
    assert config.report is not None
    tracker = Tracker()
    name = registered_name(config, config.report)
    data = collect(config.report, name, tracker)
    page = render(data, now=datetime.datetime.now().astimezone())
    location = storage.join(storage.home(), "reports", f"{config.report.replace('/', '-')}.html")
    storage.write_bytes(location, page.encode())
    run = tracker.start_run(f"report-{config.report.replace('/', '-')}", experiment=config.report, params={}, tags={})
    run.log_text(page, "report.html")
    run.finish("FINISHED")
    return Written(
        location=location,
        run_id=run.run_id,
        ui=tracker.ui_command(run.run_id, run.experiment_id),
        num_results=sum(len(section.best) for section in data.sections),
    )


def render(data: ReportData, *, now: datetime.datetime) -> str:
    """The page."""
    title = f"Evaluation of {data.experiment}"
    facts = [f"{data.num_checkpoints} published checkpoints", f"{data.num_pending} without a result"]
    champion = html.escape(data.champion) if data.champion else "none yet"
    header = (
        f"<h1>{html.escape(title)}</h1><p class='lead'>{', '.join(facts)} &middot; {now:%Y-%m-%d %H:%M %Z}</p>"
        f"<p class='champion'><b>Champion</b> {champion}</p>"
    )
    empty = "<section><p>No checkpoint has a result yet: run <code>jobs/evaluate.py --pending</code>.</p></section>"
    body = "".join(map(_section, data.sections)) or empty
    return document(title, header=header, body=body + _sheets(data.sheets))


def _section(section: Section) -> str:
    metric = html.escape(section.metric)
    unlike = "; ".join(html.escape(words) for words in section.unlike_first)
    warning = (
        f"<p class='unlike'>Not comparable with the first {metric}, whose protocol differs: {unlike}.</p>"
        if unlike
        else ""
    )
    note = f"<p class='unlike'>{html.escape(section.note)}.</p>" if section.note else ""
    heading = f"<h2>{metric} <small>protocol {section.identity}</small></h2>"
    picture = f"<figure>{chart(section.curves, title=section.metric)}{_legend(section)}</figure>"
    tables = f"<div class='columns'>{_best(section)}{_protocol(section.protocol)}</div>"
    return f"<section>{heading}{warning}{note}{picture}{tables}</section>"


def _legend(section: Section) -> str:
    return key([(curve.run, place) for place, curve in enumerate(section.curves)])


def _best(section: Section) -> str:
    others = list(dict.fromkeys(name for _, point in section.best for name in point.others))
    rows = []
    for run, point in section.best[:_MOST_ROWS]:
        interval = (
            "" if point.interval is None else f"<br><small>{point.interval[0]:.4g} to {point.interval[1]:.4g}</small>"
        )
        note = f"<br><small>{html.escape(point.note)}</small>" if point.note and not section.note else ""
        beside = "".join(
            f"<td class='n'>{point.others[name]:.3g}</td>" if name in point.others else "<td></td>" for name in others
        )
        rows.append(
            f"<tr><td>{html.escape(run)}{note}</td><td class='n'>{point.step:,}</td>"
            f"<td class='n'>{point.value:.4g}{interval}</td>{beside}</tr>"
        )
    left = len(section.best) - len(rows)
    more = f"<tr><td colspan='{3 + len(others)}'><small>and {left} more</small></td></tr>" if left else ""
    # The metric's own word is enough beside others of the same features.
    words = [name.partition("_")[0] if others else name for name in (section.metric, *others)]
    columns = "".join(f"<th class='n'>{html.escape(word)}</th>" for word in words)
    head = f"<tr><th>run</th><th class='n'>step</th>{columns}</tr>"
    return f"<div><h3>Best checkpoints</h3><table>{head}{''.join(rows)}{more}</table></div>"


def _protocol(protocol: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td><code>{html.escape(str(value))}</code></td></tr>"
        for name, value in protocol.items()
        if name != "note"
    )
    return f"<div><h3>Protocol</h3><table class='protocol'>{rows}</table></div>"


def _sheets(sheets: Sequence[Sheet]) -> str:
    if not sheets:
        return ""
    pictures = "".join(
        picture(sheet.png, alt=f"samples of {sheet.run}", caption=f"{sheet.run}, step {sheet.step:,}")
        for sheet in sheets
    )
    return section("Samples", f"<div class='sheets'>{pictures}</div>")
