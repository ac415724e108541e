"""The page on a sweep is one file, says the answer first, and looks right whatever is missing."""

import base64
import datetime
import html
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from pipeline.config import TrainConfig, as_params, override, to_flat
from pipeline.sweep.answer import SampledResult, SeedRun, Sheet, SweepReport, TrialReport
from pipeline.sweep.report_commands import commands
from pipeline.sweep.report_html import render
from pipeline.sweep.schedule_curves import schedule_curve

NOW = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)


def png(width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, width)).save(buffer, format="PNG")
    return buffer.getvalue()


def run(value: float | None, seed: int = 0, **changes: Any) -> SeedRun:
    curve = [(10, 2 * value), (20, value)] if value is not None else []
    fields = {"run": f"s-{seed}", "run_id": "r", "seed": seed, "status": "finished", "value": value, "curve": curve}
    return SeedRun(**fields | {"seconds": 61.0, "images": 1280.0} | changes)


def trial(schedule: str, T: int, *values: float | None, runs: list[SeedRun] | None = None, **knobs: Any) -> TrialReport:
    searched = {"schedule": schedule, "T": T, **knobs}
    return TrialReport(
        key=f"{schedule}-T{T}",
        knobs=searched,
        runs=runs or [run(value, seed) for seed, value in enumerate(values)],
        params=as_params(to_flat(override(TrainConfig(), searched))),
    )


def report(*trials: TrialReport, **changes: Any) -> SweepReport:
    ranked = sorted(trials, key=lambda each: (each.mean is None, each.mean or 0.0))
    fields = {"name": "s", "run_id": "r", "experiment": "e", "status": "FINISHED", "metric": "fid", "trials": ranked}
    return SweepReport(
        **fields | {"verdict": "cosine won", "identity": "abc", "protocol": {"num_images": 200}} | changes
    )


FULL = report(
    trial("cosine", 100, 20.0, 22.0),
    trial("cosine", 400, 18.0, 19.0),
    trial("linear", 100, 30.0, 31.0, beta_start=1e-4, beta_end=0.02),
    trial("linear", 400, 25.0, 27.0, beta_start=1e-4, beta_end=0.02),
    trial("linear", 400, 26.0, 28.0, beta_start=1e-4, beta_end=0.03),
)


class Reader(HTMLParser):
    """Tags with their attributes, headings, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def page(data: SweepReport) -> str:
    """The page, after checks that hold for each: it is whole, needs nothing else, and its charts are drawable."""
    text = render(data, now=NOW)
    reader = Reader(text)
    assert reader.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    sources = [attributes["src"] or "" for _, attributes in reader.tags if "src" in attributes]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text
    assert "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<(text|title).*?</\1>|aria-label=\"[^\"]*\"", "", svg)
    return text


def headings(text: str) -> list[str]:
    return Reader(text).headings


def rows(text: str, heading: str) -> list[list[str]]:
    part = text.partition(f"<h2>{heading}</h2>")[2].partition("</section>")[0]
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", part)
    return [re.findall(r"<t[dh][^>]*>(?:<code>)?(.*?)(?:</code>)?</t[dh]>", row) for row in found]


def test_the_verdict_comes_first_and_every_part_of_the_answer_is_there() -> None:
    sheet = Sheet(trial=FULL.trials[0], run=FULL.trials[0].runs[0], step=20, png=png())
    sampled = [
        SampledResult(trial="cosine", seed=0, knobs={"sampling_steps": n}, value=50.0 / n, identity="x")
        for n in (5, 10)
    ]
    text = page(
        replace(FULL, best_sheet=sheet, worst_sheet=sheet, sampled=sampled, refused=[("linear-T10", "beta above 1")])
    )
    assert text.index("cosine won") < text.index("<section>")
    assert headings(text) == [
        "Schedule and T", "Samples", "Spread of the seeds", "One knob at a time", "While training", "Cost",
        "The noise schedules", "Sampling without training again", "Refused: 1", "Protocol",
    ]  # fmt: skip
    assert "linear-T10" in text
    assert "beta above 1" in text
    assert ["num_images", "200"] in rows(text, "Protocol")


def test_a_cell_is_the_best_of_its_trials_with_its_mean_and_standard_error() -> None:
    text = page(FULL)
    part = text.partition("<h2>Schedule and T</h2>")[2].partition("</section>")[0]
    cells = re.findall(r"<td( class='best')? style=[^>]*>(?:<i>best</i>)?<b>([\d.]+)</b><small>(.*?)</small>", part)
    assert cells == [
        ("", "21.00", "\N{PLUS-MINUS SIGN} 1.00"),
        (" class='best'", "18.50", "\N{PLUS-MINUS SIGN} 0.50"),
        ("", "30.50", "\N{PLUS-MINUS SIGN} 0.50"),
        ("", "26.00", "\N{PLUS-MINUS SIGN} 1.00, best of 2"),
    ]


def test_failed_and_stopped_trials_are_marked_and_told_with_their_reason() -> None:
    failed = trial("linear", 100, runs=[run(None, status="failed", error="loss is nan at step 7")])
    stopped = trial("linear", 400, runs=[run(None, status="stopped", rungs=[(10, 90.0)])])
    text = page(report(trial("cosine", 100, 20.0), failed, stopped))
    assert "class='failed'><b>failed</b>" in text
    assert "class='stopped'><b>stopped</b><small>at step 10</small>" in text
    assert ["linear T=100", "0", "failed", "\N{EN DASH}", "loss is nan at step 7"] in rows(text, "Failed and stopped")
    assert ["linear T=400", "0", "stopped", "10", "by early stopping"] in rows(text, "Failed and stopped")


def test_one_seed_has_no_spread_and_the_page_says_so() -> None:
    text = page(report(trial("cosine", 100, 20.0), trial("linear", 100, 30.0)))
    assert "nothing says how much of a difference is chance" in text
    assert "std. error" not in text
    assert "\N{PLUS-MINUS SIGN}" not in text


def test_a_seed_that_failed_is_missing_from_the_mean_and_counted() -> None:
    text = page(report(trial("cosine", 100, 20.0, None), trial("linear", 100, 30.0, 32.0)))
    assert "1 of 2" in text
    assert [row[2] for row in rows(text, "Cost")[1:]] == ["20.00", "31.00"]


def test_a_sweep_of_one_trial_is_told_without_charts_of_one_point() -> None:
    text = page(report(trial("cosine", 100, runs=[run(20.0, curve=[(20, 20.0)])])))
    assert headings(text) == ["Cost", "The noise schedules", "Protocol"]


def test_a_sweep_in_which_all_trials_failed_has_no_ranking() -> None:
    failed = [trial("linear", T, runs=[run(None, status="failed", error="diverged")]) for T in (100, 400)]
    text = page(report(*failed, verdict="no trial finished"))
    assert "<p class='verdict open'>no trial finished</p>" in text
    assert headings(text) == ["Schedule and T", "The noise schedules", "Failed and stopped", "Protocol"]


def test_a_sweep_that_has_not_started_or_not_ended_says_so() -> None:
    assert "No trial was started." in page(report(verdict="", identity="", status="RUNNING"))
    running = report(trial("cosine", 100, 20.0), trial("linear", 100, runs=[run(None, status="running")]), verdict="")
    text = page(replace(running, status="RUNNING"))
    assert "No verdict yet: 1 of 2 trials have a result." in text
    assert "had not ended" in text


def test_many_trials_with_many_knobs_are_labelled_by_their_place() -> None:
    trials = [trial("linear", 100 + n, 20.0 + n, lr=1e-3 + n * 1e-5, loss_weighting="min-snr") for n in range(60)]
    text = page(report(*trials))
    assert "#1 linear T=100" in text
    assert "#40 linear T=139" in text
    assert "#41 linear" not in text.partition("<h2>Cost</h2>")[0]
    assert "The 40 best of 60 trials." in text


def test_a_trial_is_not_drawn_against_a_knob_that_it_does_not_have() -> None:
    part = page(FULL).partition("<h2>One knob at a time</h2>")[2].partition("</section>")[0]
    of_T, of_beta = re.findall(r"<svg.*?</svg>", part)
    assert of_T.count('class="mark') == 5
    assert of_beta.count('class="mark') == 3
    assert "beta_end (at T = 1000)" in of_beta


def test_a_line_of_training_is_the_mean_of_the_seeds_at_steps_that_all_have() -> None:
    runs = [run(10.0, 0, curve=[(5, 40.0), (20, 10.0)]), run(12.0, 1, curve=[(10, 30.0), (20, 12.0)])]
    text = page(report(trial("cosine", 100, runs=runs), trial("linear", 100, 30.0, 31.0)))
    part = text.partition("<h2>While training</h2>")[2].partition("</section>")[0]
    assert "cosine T=100, 20: 11" in part
    assert "cosine T=100, 5:" not in part


def test_the_csv_can_be_saved_from_the_page_itself() -> None:
    text = page(replace(FULL, csv="a,b\n1,2\n", csv_location="https://mlflow/sweep.csv"))
    (encoded,) = re.findall(r"href='data:text/csv;base64,(.*?)'", text)
    assert base64.b64decode(encoded) == b"a,b\n1,2\n"
    assert "href='https://mlflow/sweep.csv'" in text


def test_what_a_person_named_is_text_and_not_markup() -> None:
    evil = "<u>&'\""
    bad = trial("cosine", 100, 20.0, data=evil)
    failed = trial(evil, 100, runs=[run(None, status="failed", error=evil)])
    text = page(
        report(
            bad,
            failed,
            name=evil,
            verdict=evil,
            metric=evil,
            identity=evil,
            protocol={evil: evil, "note": evil},
            refused=[(evil, evil)],
            csv="x",
            csv_location=evil,
            experiment=evil,
            commands=commands(evil, best=bad.params, ui=[evil]),
        )
    )
    assert "<u>" not in text
    assert "&lt;u&gt;&amp;" in text


def test_the_winner_can_be_trained_anew_with_the_config_that_it_had() -> None:
    changed = {"schedule": "cosine", "T": 400, "channel_mult": (1, 2, 2), "random_flip": True, "ema_warmup": False}
    params = as_params(to_flat(override(TrainConfig(), changed)))
    lines = [line for command in commands("a b", best=params, ui=[]) for line in command.lines]
    assert "python jobs/tune.py --restore 'a b'" in lines
    (train,) = [line for line in lines if "jobs/train.py" in line]
    assert train == (
        "python jobs/train.py --name 'a b-winner' --random-flip --schedule cosine --T 400 --channel-mult 1 2 2 "
        "--no-ema-warmup"
    )


def test_the_runs_can_be_seen_side_by_side_in_mlflow() -> None:
    ui = ["mlflow server", "http://h:5/#/experiments/1/runs/a"]
    found = commands("s", best=None, ui=ui, compared=["a", "b"], experiment_id="1")
    (address,) = found[-1].lines
    assert address.startswith("http://h:5/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D")
    text = page(replace(FULL, commands=found))
    assert f"<a href='{html.escape(address)}'>" in text
    assert "<pre>mlflow server\n<a href='http://h:5/#/experiments/1/runs/a'>" in text


@pytest.mark.parametrize("T", [20, 1000])
def test_drawn_schedules_begin_with_the_image_and_end_with_noise(T: int) -> None:
    curve = schedule_curve({"schedule": "cosine", "T": str(T), "beta_start": "0.0001", "name": "x"})
    assert curve is not None
    assert len(curve.u) <= 140
    assert (curve.u[0], curve.u[-1]) == (1 / T, 1.0)
    assert curve.alpha_bar[0] > 0.98
    assert curve.alpha_bar[-1] < 1e-3
    assert list(curve.log_snr) == sorted(curve.log_snr, reverse=True)
    assert schedule_curve({"schedule": "unheard of", "T": str(T)}) is None
    assert schedule_curve({"schedule": "cosine", "T": "many"}) is None
