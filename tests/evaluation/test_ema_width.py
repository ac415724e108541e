"""Averages of any width from the published checkpoints of a run in a real MLflow store."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "jobs"))

from runner import TINY, run_job, succeed

from pipeline.config import EvaluateConfig, PrepareConfig, TrainConfig, as_params, override, to_flat
from pipeline.data.manifest import load_manifest
from pipeline.data.prepare import prepare
from pipeline.data.sources import open_source
from pipeline.diffusion.averages import Averages
from pipeline.diffusion.power_ema import PowerEma
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.protocol import Protocol
from pipeline.evaluation.selection import select
from pipeline.evaluation.weights import Candidate, fetch
from pipeline.model_folder import average_file, build_unet, write_meta, write_tensors
from pipeline.storage import home, resolve
from pipeline.tracking import Tracker

STEPS = 40


def publish_run(tracker: Tracker, name: str, ema_power: tuple[float, ...], *, every: int) -> dict[str, Tensor]:
    """A run with a checkpoint every so many steps; a random walk of a small network's weights stands for training.

    Returns:
        What an average of width 0.08 is at the end.
    """
    location = resolve("digits", "data")
    config = override(TrainConfig(), {"base_channels": 8, "name": name, "ema_power": ema_power, "sampling_steps": 4})
    manifest = load_manifest(location)
    run = tracker.start_run(name, experiment="ddpm", params=as_params(to_flat(config)), tags={})
    unet, generator = build_unet(config.model), torch.Generator().manual_seed(0)
    averages = Averages(unet, decay=0.9, warmup=True, power=ema_power)
    direct = PowerEma(unet, sigma_rel=0.08)
    for step in range(STEPS):
        for parameter in unet.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
        averages.update(unet, step)
        direct.update(unet, step)
        if (step + 1) % every == 0:
            folder = Path(home()) / f"{name}-{step + 1}"
            folder.mkdir()
            for stem, tensors in averages.tensors().items():
                write_tensors(folder, average_file(stem), tensors)
            data = {"location": location, "digest": manifest.digest}
            write_meta(folder, step=step + 1, config=config, data=data, code={})
            run.publish(folder, step + 1, {"data.digest": manifest.digest, "data.location": location})
    run.finish("FINISHED")
    return direct.state_dict()


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """A home with four runs, made once, and the average of width 0.08 of the run ``power``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_HOME", folder := str(tmp_path_factory.mktemp("widths")))
        prepare(open_source("digits"), PrepareConfig(), resolve("digits", "data"))
        tracker = Tracker()
        found = publish_run(tracker, "power", (0.05, 0.10), every=10)
        publish_run(tracker, "one-width", (0.10,), every=20)
        publish_run(tracker, "one-snapshot", (0.05,), every=40)
        publish_run(tracker, "no-width", (), every=40)
        yield folder, found


@pytest.fixture
def tracker(direct: tuple[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("DDPM_HOME", direct[0])
    return Tracker()


def chosen(tracker: Tracker, **knobs: object) -> list[Candidate]:
    """What an evaluation would measure, newest first."""
    return select(EvaluateConfig(**{"run": "power", "ema_width": 0.08} | knobs), tracker)  # type: ignore[arg-type]


def test_each_checkpoint_uses_the_snapshots_up_to_its_step_and_says_so(tracker: Tracker) -> None:
    found = chosen(tracker)
    assert [candidate.checkpoint.step for candidate in found] == [40, 30, 20, 10]
    assert [candidate.weights for candidate in found] == [
        f"ema-power 0.080 reconstructed from {count} snapshots" for count in (8, 6, 4, 2)
    ]
    assert all(s.step <= candidate.checkpoint.step for candidate in found for s in candidate.snapshots)


def test_the_reconstructed_weights_are_those_of_an_average_of_that_width(
    tracker: Tracker, direct: tuple[str, dict[str, Tensor]]
) -> None:
    """Four checkpoints meet the profile to 3 %, and the weights to 0.15 % of their size."""
    files, error = fetch(chosen(tracker, last=True)[0], tracker)
    found = load(files.weights)
    assert error == pytest.approx(0.03, abs=0.003)
    assert found.keys() == direct[1].keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    squares = [
        (float((found[name] - kept).square().sum()), float(kept.square().sum())) for name, kept in direct[1].items()
    ]
    away, size = map(sum, zip(*squares, strict=True))
    assert (away / size) ** 0.5 < 0.002


def test_the_reconstructed_model_is_checked_like_a_published_one(tracker: Tracker) -> None:
    candidate = chosen(tracker, last=True)[0]
    files, _ = fetch(candidate, tracker)
    meta = json.loads(files.meta)
    assert list(meta["files"]) == ["ema.safetensors"]
    assert (meta["step"], meta["config"]["base_channels"]) == (40, 8)
    assert files.model_id != candidate.checkpoint.model_id


def test_a_damaged_snapshot_is_refused_by_name(tracker: Tracker) -> None:
    candidate = chosen(tracker, last=True)[0]
    holder = chosen(tracker, step=30)[0].checkpoint
    file = Path(holder.artifact_uri.removeprefix("file://")) / "ema-power-0.100.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WorldError, match=r"ema-power-0\.100\.safetensors is damaged"):
        fetch(candidate, tracker)
    file.write_bytes(whole)


def test_the_ema_has_the_identity_it_always_had_and_each_width_another(tracker: Tracker) -> None:
    class Extractor:
        metric, name, sha256, resize, dim = "fid", "inception", "0" * 64, "299", 2048

    def identity(candidate: Candidate) -> str:
        config = EvaluateConfig(pending=True)
        return Protocol.of(config, Extractor(), "d" * 64, candidate.weights, candidate.metric_suffix).identity  # type: ignore[arg-type]

    plain = chosen(tracker, ema_width=None, last=True)[0]
    assert (plain.weights, plain.metric_suffix, plain.snapshots) == ("ema", "", {})
    assert identity(plain) == "dcfc39579b52a145"
    wide = [identity(chosen(tracker, last=True, ema_width=width)[0]) for width in (0.08, 0.0801, 0.12)]
    assert len({identity(plain), *wide}) == 4


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("no-width", r"run 'no-width' kept no power-function averages, .*; train with --ema-power 0\.05 0\.10"),
        ("one-snapshot", r"'one-snapshot' has one snapshot .* and --ema-width needs 2; .*--ema-power 0\.05 0\.10"),
    ],
)
def test_a_run_with_too_few_snapshots_is_one_clear_line(run: str, message: str, tracker: Tracker) -> None:
    with pytest.raises(UserError, match=message):
        chosen(tracker, run=run)
    assert chosen(tracker, run=run, ema_width=None)


def test_pending_leaves_out_runs_and_checkpoints_that_have_too_few(tracker: Tracker) -> None:
    found = chosen(tracker, run=None, pending=True)
    steps = [(candidate.checkpoint.run_name, candidate.checkpoint.step) for candidate in found]
    assert steps == [("one-width", 40), *(("power", step) for step in (40, 30, 20, 10))]


def test_a_step_without_enough_snapshots_is_named(tracker: Tracker) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 20 that has enough snapshots up to it; .*\[40\]"):
        chosen(tracker, run="one-width", step=20)


@pytest.mark.usefixtures("one_cluster")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_width_is_evaluated_beside_the_ema_and_kept_apart_from_it(tracker: Tracker) -> None:
    words = ["--run", "power", "--last", "--num-images", "40", "--chunk-size", "20", "--sampling-steps", "4"]
    plain = succeed("evaluate", *words)["evaluated"]
    wide = succeed("evaluate", *words, "--ema-width", "0.08")["evaluated"]
    again = run_job("evaluate", *words, "--ema-width", "0.08")
    assert "nothing to do" in again.stdout
    assert [entry["weights"] for entry in plain + wide] == ["ema", "ema-power 0.080 reconstructed from 8 snapshots"]
    assert [entry["metric"] for entry in plain + wide] == [
        "fd_efficientnet_lite0",
        "fd_efficientnet_lite0-ema-power-0.080",
    ]
    assert plain[0]["identity"] != wide[0]["identity"]
    assert plain[0]["value"] != wide[0]["value"]

    checkpoint = chosen(tracker, ema_width=None, last=True, step=40)[0].checkpoint
    stored = checkpoint.result(wide[0]["identity"])
    assert stored["metrics"] == {wide[0]["metric"]: wide[0]["value"]}
    assert stored["protocol"]["weights"] == wide[0]["weights"]
    assert float(stored["protocol"]["ema_profile_error"]) == pytest.approx(0.03, abs=0.003)
    history = tracker.client.get_metric_history(checkpoint.run_id, plain[0]["metric"])
    assert [metric.step for metric in history] == [40]


@pytest.mark.usefixtures("one_cluster")
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_trained_run_publishes_what_a_width_is_made_from() -> None:
    succeed("prepare_data")
    succeed("train", *TINY, "--name", "trained", "--ema-power", "0.05", "0.10")
    words = ["--run", "trained", "--num-images", "20", "--chunk-size", "20", "--sampling-steps", "4"]
    found = succeed("evaluate", *words, "--ema-width", "0.08")["evaluated"]
    assert [(entry["step"], entry["weights"]) for entry in found] == [
        (step, f"ema-power 0.080 reconstructed from {count} snapshots") for step, count in ((20, 4), (10, 2))
    ]
    assert len({entry["value"] for entry in found}) == 2
