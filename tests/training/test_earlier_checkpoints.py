"""Checkpoints that earlier versions wrote are read: what docs/compatibility.md promises."""

from pathlib import Path

import pytest
import torch

from pipeline.diffusion.averages import Averages
from pipeline.model_folder import EMA_FILE, build_schedule, build_unet, fetch_model, load_tensors, read_meta
from pipeline.training.arithmetic import Arithmetic, make_optimizer
from pipeline.training.checkpoint import RunState, load_checkpoint, save_published

FOLDERS = sorted(path for path in (Path(__file__).parent / "checkpoints").iterdir() if path.is_dir())
# The first values that the writer's network predicted, in its own words, for the input below.
PREDICTED = {
    "first-085e56e": [-0.002798857167363167, 0.012472419999539852, -0.030967192724347115, -0.008955085650086403],
    "parts-5933239": [-0.0027988574001938105, 0.012472421862185001, -0.030967192724347115, -0.008955087512731552],
}


def restored(folder: Path) -> tuple[RunState, int]:
    config = read_meta(folder).config
    unet = build_unet(config.model, seed=99)
    recipe, device = config.optimizer, torch.device("cpu")
    averages = Averages(unet, decay=recipe.ema_decay, warmup=recipe.ema_warmup, power=recipe.ema_power)
    optimizer = make_optimizer(unet, lr=recipe.lr, eps=recipe.adam_eps, device=device)
    scaler = Arithmetic(config.compute, device).scaler
    state = RunState(unet=unet, averages=averages, optimizer=optimizer, scaler=scaler)
    return state, load_checkpoint(folder, state)


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_earlier_version_is_here_and_small():
    assert [folder.name for folder in FOLDERS] == sorted(PREDICTED)
    assert all(file.stat().st_size < 100_000 for folder in FOLDERS for file in folder.iterdir())


def test_a_run_goes_on_from_an_earlier_checkpoint(folder):
    state, step = restored(folder)
    assert step == 2
    moments = state.optimizer.state_dict()["state"]
    assert len(moments) == len(list(state.unet.parameters()))
    assert all(int(moment["step"]) == 2 and bool(moment["exp_avg_sq"].any()) for moment in moments.values())
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    loss = (state.unet(x, torch.tensor([3])) - x).square().mean()
    loss.backward()
    state.optimizer.step()
    assert bool(torch.isfinite(loss))


def test_the_network_of_an_earlier_checkpoint_predicts_what_it_predicted(folder):
    state, _ = restored(folder)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = state.unet.eval()(x, torch.tensor([3])).flatten()[:4]
    torch.testing.assert_close(found, torch.tensor(PREDICTED[folder.name]), rtol=1e-5, atol=1e-6)


def test_an_earlier_checkpoint_can_be_evaluated_and_published(folder, tmp_path):
    (tmp_path / "read").mkdir()
    meta, ema = fetch_model(str(folder), tmp_path / "read")
    build_unet(meta.config.model).load_state_dict(ema, strict=True)
    assert build_schedule(meta.config.diffusion).T == 10
    (tmp_path / "published").mkdir()
    assert save_published(folder, tmp_path / "published") == 2
    again = load_tensors(tmp_path / "published", EMA_FILE, read_meta(tmp_path / "published"))
    assert all(torch.equal(again[name], ema[name]) for name in ema)


def test_knobs_that_came_later_have_their_defaults(folder):
    config = read_meta(folder).config
    assert (config.init_from, config.model.prediction, config.model.num_classes) == (None, "eps", 0)
