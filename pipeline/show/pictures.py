"""The pictures: what is computed for each, and the words beside it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline import draws
from pipeline.config import SamplingConfig
from pipeline.diffusion.noise_schedule import NoiseSchedule
from pipeline.diffusion.process import q_sample
from pipeline.diffusion.stepping import Denoiser, everywhere
from pipeline.generation import denoiser_of
from pipeline.images import to_model_range, to_uint8
from pipeline.show.curves import draw_schedules
from pipeline.show.neighbours import MOST_IMAGES, nearest
from pipeline.show.page import Picture
from pipeline.show.sheet import Row, draw_sheet
from pipeline.show.subject import DataSet, Model
from pipeline.show.walks import Look, evenly, finish, interpolated, shared_noise, walk

__all__ = ["ModelPictures", "forward", "schedule_curves"]

_COLUMNS = 9
_FORWARD_AT = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
_SHARED_AT = (0.75, 0.5, 0.25, 0.1)
_ENCODED_AT = (0.125, 0.25, 0.5, 0.75, 1.0)
_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
_NUM_NEIGHBOURS = 6


def schedule_curves(schedules: Mapping[str, NoiseSchedule]) -> Picture:
    """alpha_bar and log-SNR of each schedule."""
    return Picture(
        name="schedules",
        title="Noise schedules",
        caption="How much of the image is left at each step. The left curve must end close to 0, since sampling begins "
        "with pure noise. Where the right one is steep, a step changes the noise level by much.",
        png=draw_schedules(schedules),
    )


def forward(images: Tensor, schedules: Mapping[str, NoiseSchedule], seed: int) -> Picture:
    """Real images on their way to noise, under each schedule; the same noise for all of them.

    Args:
        images: uint8 [B, C, H, W]; the first schedule gets all of them, the others the first one.
        schedules: By name; the model's first.
        seed: Of the noise.
    """
    clean = to_model_range(images)
    eps = draws.standard_normal(tuple(images.shape), seed, draws.Purpose.SHOW_NOISE)
    rows: list[Row] = []
    for place, (name, schedule) in enumerate(schedules.items()):
        shown = clean if place == 0 else clean[:1]
        steps = [_step(share, schedule.T) for share in _FORWARD_AT]
        noisy = [to_uint8(q_sample(schedule, shown, everywhere(t, shown), eps[: len(shown)])) for t in steps]
        for number, image in enumerate(images[: len(shown)]):
            row = [image, *(step[number] for step in noisy)]
            rows.append(Row(images=row, label=name if number == 0 else "", is_apart=number == 0 and place > 0))
    return Picture(
        name="forward",
        title="Forward process",
        caption="Real images, noised to step t in one jump: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps "
        "(DDPM Eq. 4). The network learns to tell eps from x_t. Further schedules are shown on the first image.",
        png=draw_sheet("Forward process q(x_t | x_0)", ["x_0", *(f"{share:g} T" for share in _FORWARD_AT)], rows),
    )


class ModelPictures:
    """Pictures of one model. Each is a function of the weights, the sampler's knobs and the seed."""

    def __init__(self, model: Model, config: SamplingConfig, num_images: int) -> None:
        """Walks once from noise to images; several pictures are looks at this walk."""
        self._model, self._config, self._num_images = model, config, num_images
        self._looks, self._x_0 = walk(self._denoiser(num_images), model.schedule, config, (num_images, *model.shape))

    @property
    def samples(self) -> Tensor:
        """The images at the end of the walk, uint8 [num_images, C, H, W]."""
        return to_uint8(self._x_0).cpu()

    def trajectory(self) -> Picture:
        """x_t along the walk."""
        return Picture(
            name="trajectory",
            title="Denoising trajectory",
            caption="From pure noise to images: x_t at some of the steps, a row for each image.",
            png=self._along("Denoising trajectory, x_t", lambda look: look.x_t),
        )

    def progressive(self) -> Picture:
        """The predicted x_0 along the walk: the paper's Fig. 6."""
        return Picture(
            name="progressive",
            title="Progressive generation",
            caption="What the network takes the final image to be at each step: x_0 predicted from x_t (DDPM Eq. 15, "
            "Fig. 6 and 10). Large structures are settled first, details last.",
            png=self._along("Progressive generation, predicted x_0", lambda look: look.x_0),
        )

    def sharing(self) -> Picture:
        """Samples that share x_t: the paper's Fig. 7."""
        model, config, count = self._model, self._config, max(2, self._num_images)
        denoise, device = self._denoiser(count), model.schedule.betas.device
        rows = []
        for row, share in enumerate(_SHARED_AT):
            look = self._nearest_look(_step(share, model.schedule.T))
            x_t = look.x_t[:1].expand(count, -1, -1, -1)
            shape = (count, *model.shape)

            def noise_at(index: int, row: int = row, shape: tuple[int, ...] = shape) -> Tensor:
                seed, purpose = config.sample_seed, draws.Purpose.SHOW_STEP
                return draws.standard_normal(shape, seed, purpose, 100 + row, index).to(device)

            ends = finish(denoise, model.schedule, config, x_t, look.t, noise_at, is_ancestral=True)
            pixels = to_uint8(torch.cat([look.x_t[:1], look.x_0[:1], ends])).cpu()
            rows.append(Row(images=list(pixels), label=f"t = {look.t}"))
        return Picture(
            name="sharing",
            title="Images that share x_t",
            caption="The same x_t, finished several times with other noise (DDPM Fig. 7). Shared late, the images have "
            "details in common; shared early, only the coarsest features. The second column is the x_0 predicted from "
            "the shared x_t.",
            png=draw_sheet(
                "Images that share x_t",
                ["x_t", "predicted", *(f"no. {number + 1}" for number in range(count))],
                rows,
                set_apart=(2,),
            ),
        )

    def interpolation(self, images: Tensor) -> Picture:
        """Two real images, mixed at step t and brought back: the paper's Fig. 8.

        Args:
            images: uint8 [2, C, H, W].
        """
        model, config = self._model, self._config
        device = model.schedule.betas.device
        ends = to_model_range(images).to(device)
        eps = draws.standard_normal(tuple(ends.shape), config.sample_seed, draws.Purpose.SHOW_NOISE, 1).to(device)
        denoise = self._denoiser(len(_SHARES))
        mixed = torch.stack([to_uint8((1 - s) * ends[0] + s * ends[1]) for s in _SHARES]).cpu()
        rows = [Row(images=[images[0], *mixed, images[1]], label="pixels")]
        for row, share in enumerate(_ENCODED_AT):
            t = _step(share, model.schedule.T)
            x_t = interpolated(model.schedule, ends, eps, _SHARES, t)
            noise = shared_noise(x_t.shape, config.sample_seed, device, row=row)
            is_ancestral = config.sampler == "ddpm"
            ends_at = finish(denoise, model.schedule, config, x_t, t, noise, is_ancestral=is_ancestral)
            found = to_uint8(ends_at).cpu()
            rows.append(Row(images=[None, *found, None], label=f"t = {t}", is_apart=row == 0))
        title = "Interpolation at step t, with a share s of the right image"
        names = ["source", *(f"s = {s:g}" for s in _SHARES), "source"]
        return Picture(
            name="interpolation",
            title="Interpolation",
            caption="Two real images are noised to step t, mixed with a share s of the right one, and brought back "
            "(DDPM Fig. 8), by DDIM or, with --sampler ddpm, with the same noise for all mixes. The first row mixes "
            "pixels. Small t: details are repaired. Large t: other images, which have less and less to do with the "
            "sources.",
            png=draw_sheet(title, names, rows, set_apart=(1, len(_SHARES) + 1)),
        )

    def neighbours(self, data: DataSet) -> Picture:
        """The samples and the images of the data set that are nearest to them."""
        samples = self.samples
        found, seen = nearest(samples, data, _NUM_NEIGHBOURS)
        part = f" of the first {seen:,}" if seen >= MOST_IMAGES and seen < data.manifest.num_images else ""
        rows = [Row(images=[sample, *row]) for sample, row in zip(samples, found, strict=True)]
        return Picture(
            name="neighbours",
            title="Nearest neighbours",
            caption=f"Each sample and the training images{part} whose pixels are nearest. A sample that equals its "
            "neighbour was remembered.",
            png=draw_sheet(
                "Samples and their nearest training images",
                ["sample", *(f"{place + 1}" for place in range(_NUM_NEIGHBOURS))],
                rows,
                set_apart=(1,),
            ),
        )

    def _denoiser(self, size: int) -> Denoiser:
        model = self._model
        return denoiser_of(model.unet, model.schedule, self._config, trained=model.meta.config, size=size, chunk=0)

    def _along(self, title: str, part: Callable[[Look], Tensor]) -> bytes:
        looks = [self._looks[place] for place in evenly(len(self._looks), _COLUMNS)]
        steps = [to_uint8(part(look)).cpu() for look in looks]
        rows = [Row(images=[*(step[number] for step in steps), sample]) for number, sample in enumerate(self.samples)]
        return draw_sheet(title, [*(f"t = {look.t}" for look in looks), "x_0"], rows, set_apart=(len(looks),))

    def _nearest_look(self, t: int) -> Look:
        return min(self._looks, key=lambda look: abs(look.t - t))


def _step(share: float, T: int) -> int:
    """The step at a share of T, as the code counts: T itself is T - 1."""
    return min(T - 1, max(0, round(share * T) - 1))
