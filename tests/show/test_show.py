"""Pictures of schedules and models: what they show, that they are repeatable, and what is refused."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from publishing import prepare_digits, publish_run, write_model

from pipeline.config import SamplingConfig, ShowConfig
from pipeline.diffusion.noise_schedule import make_schedule
from pipeline.diffusion.process import q_sample
from pipeline.diffusion.stepping import everywhere
from pipeline.errors import UserError, WorldError
from pipeline.generation import denoiser_of, generate_chunk
from pipeline.images import to_uint8
from pipeline.show.neighbours import nearest
from pipeline.show.session import Shown, show
from pipeline.show.sheet import Row, draw_sheet
from pipeline.show.subject import load_data, load_model
from pipeline.show.walks import evenly, finish, interpolated, walk
from pipeline.tracking import Tracker

FEW = SamplingConfig(sampling_steps=4)
ALL = ["schedules", "forward", "trajectory", "progressive", "sharing", "interpolation", "neighbours"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model of the digits with random weights."""
    folder = tmp_path / "model"
    write_model(folder, name="drawn", step=7, seed=0, location=prepare_digits(), noise=0.1)
    return folder


def names(shown: Shown) -> list[str]:
    return [Path(picture).stem for picture in shown.pictures]


def test_schedules_are_drawn_without_model_and_data(tmp_path: Path):
    shown = show(ShowConfig(pictures=("schedules",), Ts=(50, 1000), out=str(tmp_path / "out")))
    assert names(shown) == ["schedules"]
    assert Image.open(tmp_path / "out" / "schedules.png").width > 600


def test_without_a_model_the_pictures_of_models_are_left_out():
    prepare_digits()
    shown = show(ShowConfig(num_images=2))
    assert names(shown) == ["schedules", "forward"]


def test_a_model_gets_every_picture_on_a_page_that_needs_nothing_else(model_folder: Path):
    shown = show(ShowConfig(checkpoint=str(model_folder), num_images=3, sampling=FEW))
    assert names(shown) == ALL
    page = Path(shown.page).read_text()
    assert page.count("src='data:image/png;base64,") == len(ALL)
    assert not re.findall(r"(?:src|href)='(?!data:|#)", page)
    assert "drawn, step 7" in page
    assert Path(shown.page).parent.name == "drawn-step-7"


def test_pictures_are_a_function_of_the_seed(model_folder: Path, tmp_path: Path):
    def drawn(seed: int, out: str) -> list[bytes]:
        sampling = SamplingConfig(sampling_steps=4, sample_seed=seed)
        wanted = ("forward", "trajectory", "sharing", "interpolation")
        config = ShowConfig(
            checkpoint=str(model_folder), pictures=wanted, num_images=2, out=str(tmp_path / out), sampling=sampling
        )
        return [Path(picture).read_bytes() for picture in show(config).pictures]

    first = drawn(0, "a")
    assert drawn(0, "b") == first
    assert not set(drawn(1, "c")) & set(first)


def test_the_pictures_of_a_run_are_logged_to_it(tracker: Tracker):
    prepare_digits()
    run_id = publish_run(tracker, "shown", 5, 10)
    shown = show(ShowConfig(run="shown", num_images=2, log=True, pictures=("trajectory",), sampling=FEW))
    logged = [entry.path for entry in tracker.client.list_artifacts(run_id, "show/step-00000010")]
    assert sorted(logged) == ["show/step-00000010/index.html", "show/step-00000010/trajectory.png"]
    assert run_id in "".join(shown.logged)


def test_a_run_is_shown_at_the_step_that_is_asked_for(tracker: Tracker):
    prepare_digits()
    publish_run(tracker, "steps", 5, 10)
    wanted = ShowConfig(run="steps", step=5, num_images=1, pictures=("trajectory",), sampling=FEW)
    assert Path(show(wanted).page).parent.name == "steps-step-5"
    with pytest.raises(UserError, match="no checkpoint of step 6; there are 5, 10"):
        show(ShowConfig(run="steps", step=6, sampling=FEW))
    with pytest.raises(UserError, match=r"no run is called 'nobody'.*steps"):
        show(ShowConfig(run="nobody"))


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A model of others: no run, no data set."""
    write_model(tmp_path / "of-others", name="x", step=7, seed=0, location=prepare_digits(), noise=0.1)
    meta = tmp_path / "of-others" / "meta.json"
    record = json.loads(meta.read_text())
    record["config"]["name"] = None
    record["data"] = {"location": "unknown: imported from here", "digest": "", "num_images": 0, "class_names": []}
    meta.write_text(json.dumps(record))
    return tmp_path / "of-others"


def test_an_imported_model_is_shown_under_its_folders_name_where_no_images_are_needed(imported: Path):
    shown = show(ShowConfig(checkpoint=str(imported), pictures=("schedules", "trajectory"), num_images=1, sampling=FEW))
    assert names(shown) == ["schedules", "trajectory"]
    assert Path(shown.page).parent.name == "of-others-step-7"
    assert "of-others, step 7" in Path(shown.page).read_text()


def test_pictures_of_an_imported_model_that_need_images_ask_for_data(imported: Path):
    with pytest.raises(UserError, match="is an imported model, which names no training images: give --data for"):
        show(ShowConfig(checkpoint=str(imported), num_images=1, sampling=FEW))
    shown = show(ShowConfig(checkpoint=str(imported), pictures=("forward",), data="digits", num_images=1))
    assert names(shown) == ["forward"]


def test_a_damaged_model_is_named_by_the_place_that_was_given(model_folder: Path):
    weights = model_folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WorldError, match=f"^{weights} is damaged"):
        show(ShowConfig(checkpoint=str(model_folder), pictures=("trajectory",)))
    (model_folder / "meta.json").write_text("{}")
    with pytest.raises(WorldError, match=f"^{model_folder}/meta.json is missing or damaged"):
        show(ShowConfig(checkpoint=str(model_folder), pictures=("trajectory",)))


def test_pictures_that_need_a_model_are_refused_without_one():
    with pytest.raises(UserError, match="--pictures trajectory: these need a model"):
        show(ShowConfig(pictures=("trajectory",)))


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"is no model: give a folder with ema\.safetensors and meta\.json"):
        show(ShowConfig(checkpoint=str(tmp_path)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"run": "a", "checkpoint": "b"}, "give --run or --checkpoint, not both"),
        ({"log": True}, "--log needs --run"),
        ({"step": 3, "checkpoint": "b"}, "--step needs --run"),
        ({"num_images": 0}, "--num-images 0: must be in 1..32"),
        ({"schedules": ()}, "--schedules"),
        ({"beta_ranges": ("1",)}, "is not START:END"),
    ],
)
def test_what_does_not_go_together_is_refused(knobs: dict[str, object], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        ShowConfig(**knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "heun"])
def test_a_walk_ends_at_the_images_of_an_evaluation(model_folder: Path, sampler: str):
    config = ShowConfig(
        checkpoint=str(model_folder),
        sampling=SamplingConfig(sampler=sampler, sampling_steps=5),  # type: ignore[arg-type]
    )
    model = load_model(config, None, None)
    assert model is not None
    shape, trained = (3, *model.shape), model.meta.config
    denoise = denoiser_of(model.unet, model.schedule, config.sampling, trained=trained, size=3, chunk=0)
    looks, x_0 = walk(denoise, model.schedule, config.sampling, shape)
    made = generate_chunk(model.unet, model.schedule, config.sampling, trained=trained, shape=shape, chunk=0)
    assert to_uint8(x_0).equal(made)
    steps = [look.t for look in looks]
    assert steps == sorted(set(steps), reverse=True)
    assert (steps[0], steps[-1]) == (999, 0)


def test_images_that_share_a_late_step_are_closer_than_those_that_share_an_early_one(model_folder: Path):
    config = ShowConfig(checkpoint=str(model_folder), sampling=SamplingConfig(sampler="ddpm", sampling_steps=50))
    model = load_model(config, None, None)
    assert model is not None
    denoise = denoiser_of(model.unet, model.schedule, config.sampling, trained=model.meta.config, size=4, chunk=0)
    looks, _ = walk(denoise, model.schedule, config.sampling, (1, *model.shape))

    def spread(t: int) -> float:
        look = min(looks, key=lambda each: abs(each.t - t))
        generator = torch.Generator().manual_seed(t)
        ends = finish(
            denoise,
            model.schedule,
            config.sampling,
            look.x_t.expand(4, -1, -1, -1),
            look.t,
            lambda _: torch.randn(4, *model.shape, generator=generator),
            is_ancestral=True,
        )
        return float(ends.std(dim=0).mean())

    assert spread(20) < spread(200) < spread(900)


def test_a_mix_at_its_ends_is_the_noised_image_and_keeps_the_level_of_noise():
    schedule = make_schedule("linear", T=100)
    generator = torch.Generator().manual_seed(0)
    ends = torch.zeros(2, 1, 64, 64, dtype=torch.float64)
    ends[1] = 0.5
    eps = torch.randn(2, 1, 64, 64, generator=generator, dtype=torch.float64)
    mixed = interpolated(schedule, ends, eps, (0.0, 0.5, 1.0), 60)
    pure = q_sample(schedule, ends, everywhere(60, ends), eps)
    torch.testing.assert_close(mixed[[0, 2]], pure)
    variance = float(1 - schedule.alphas_cumprod[60])
    assert float(mixed[1].var()) == pytest.approx(variance, rel=0.05)


def test_an_image_of_the_data_set_is_its_own_nearest_neighbour():
    prepare_digits()
    data = load_data(ShowConfig(), None)
    images = data.images(3, seed=5)
    found, seen = nearest(images, data, 4)
    assert seen == data.manifest.num_images == 1797
    assert found[:, 0].equal(images)
    distances = (found.float() - images[:, None].float()).square().sum(dim=(2, 3, 4))
    assert distances.equal(distances.sort(dim=1).values)


def test_a_sheet_shows_pixels_unsmoothed_and_in_their_places():
    images = torch.arange(4, dtype=torch.uint8).mul(60)[:, None, None, None].expand(4, 1, 8, 8)
    sheet = draw_sheet("title", ["a", "b", "c"], [Row(images=list(images[:3])), Row(images=[None, None, images[3]])])
    picture = Image.open(io.BytesIO(sheet)).convert("L")
    areas = picture.histogram()
    assert all(areas[level] >= 64 * 64 for level in (0, 60, 120, 180))
    assert picture.getpixel((picture.width - 40, picture.height - 40)) == 180


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(3, 9, [0, 1, 2]), (9, 3, [0, 4, 8]), (50, 4, [0, 16, 33, 49])]
)
def test_columns_are_spread_evenly_with_first_and_last(count: int, most: int, expected: list[int]):
    assert evenly(count, most) == expected
