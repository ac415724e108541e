"""Speed of evaluation beside others: ``python benchmarks/metrics.py --help``.

Three tables: the Frechet distance beside scipy's matrix square root, Inception features beside torch-fidelity's own
extractor with the same random weights, and DDIM sampling beside the bare forward passes and diffusers' pipeline.
Contenders live in one process and take turns, so that what else the machine does meets all alike.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from networks import NETWORKS, OURS
from report import machine, markdown, spread, version_of
from stand_in import stand_in_for_torchvision
from torch import Tensor

from pipeline.diffusion.noise_schedule import make_schedule
from pipeline.diffusion.samplers import ddim
from pipeline.diffusion.timesteps import sampling_timesteps
from pipeline.evaluation.frechet import FrechetReference
from pipeline.evaluation.inception import Inception
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance

_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures the Frechet distance, Inception features and DDIM sampling."""

    parts: tuple[str, ...] = ("frechet", "features", "sampling")
    """What to measure."""
    repeats: int = 3
    """Rounds, after one that is not counted (scipy takes part in one round only)."""
    threads: int = 2
    """Threads of torch."""
    dim: int = 2048
    """Length of the features of the Frechet distance."""
    feature_batch: int = 16
    """Images of a batch for the feature network."""
    batch: int = 4
    """Images that are sampled together."""
    steps: int = 50
    """Steps of DDIM."""
    out: Path | None = None
    """File for all measurements, as JSON."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(_PARTS))
        if unknown:
            raise SystemExit(f"--parts {' '.join(unknown)}: give some of {', '.join(_PARTS)}")
        if min(self.repeats, self.threads, self.dim, self.feature_batch, self.batch, self.steps) < 1:
            raise SystemExit("all numbers are at least 1")


@dataclass
class Contender:
    """One way to do the work."""

    title: str
    run: Callable[[], Any]
    """Does it once; returns what is compared."""
    rounds: int | None = None
    """Takes part in so many rounds only, and has no warm-up."""
    seconds: list[float] = field(default_factory=list)
    result: Any = None
    failed: str | None = None


def main(arguments: Arguments) -> None:
    """Measures everything and prints the tables."""
    torch.set_num_threads(arguments.threads)
    facts = machine()
    facts["versions"] |= {name: found for name in _PEERS if (found := version_of(name))}
    record = {}
    for part in arguments.parts:
        title, head, rows, contenders = _PARTS[part](arguments)
        print(f"{title}, {arguments.threads} threads:\n\n{markdown(head, rows, facts)}\n", flush=True)
        record[part] = [
            {key: value for key, value in asdict(c).items() if key in ("title", "seconds", "failed")}
            for c in contenders
        ]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": facts, "parts": record}, indent=2) + "\n")


_PEERS = ("scipy", "torch-fidelity", "diffusers")


def _take_turns(contenders: list[Contender], repeats: int) -> None:
    present = [contender for contender in contenders if contender.failed is None]
    for number in range(repeats + 1):
        turn = number % len(present)
        for contender in present[turn:] + present[:turn]:
            if contender.rounds is not None and not 0 < number <= contender.rounds:
                continue
            started = time.perf_counter()
            contender.result = contender.run()
            if number > 0:
                contender.seconds.append(time.perf_counter() - started)
        print(f"round {number} of {repeats} done", file=sys.stderr, flush=True)


def _ratio(ours: Contender, theirs: Contender) -> str:
    """Their seconds over ours, within each round where both took part."""
    if theirs.failed is not None:
        return ""
    return f"{statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=False)):.2f}"


def _rates(contender: Contender, count: int) -> str:
    if contender.failed is not None:
        return f"not installed: {contender.failed}"
    return spread([count / seconds for seconds in contender.seconds], ".2f")


Table = tuple[str, list[str], list[list[str]], list[Contender]]


def _frechet(arguments: Arguments) -> Table:
    dim, rows, everyone = arguments.dim, [], []
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)
    decades = torch.logspace(0, -2, dim)

    def draw(n: int) -> Tensor:
        return (torch.randn(n, dim, generator=generator) * decades) @ mixing

    reference = _statistics(draw(5000))
    for n in (5000, 1000):
        features = draw(n) + 0.01
        made = _statistics(features)
        ours = Contender("ours, from two covariances", lambda made=made: frechet_distance(made, reference))
        contenders = [
            ours,
            Contender(
                "ours, from features, reference included", lambda x=features: FrechetReference(reference).distance(x)
            ),
            _scipy(made, reference),
        ]
        _take_turns(contenders, arguments.repeats)
        best = ours.result
        for contender in contenders:
            if contender.failed is not None:
                rows.append([contender.title, str(n), f"not installed: {contender.failed}", "", ""])
                continue
            seconds = spread(contender.seconds, ".2f")
            away = f"{abs(contender.result / best - 1):.1e}"
            rows.append([contender.title, str(n), seconds, _ratio(ours, contender), away])
        everyone += contenders
    head = ["Frechet distance", "images", "seconds", "this / ours", "relative difference"]
    return f"{dim}-d features, reference of 5,000 images", head, rows, everyone


def _statistics(features: Tensor) -> FeatureStatistics:
    made = FeatureStatistics.empty(features.shape[1])
    made.update(features)
    return made


def _scipy(a: FeatureStatistics, b: FeatureStatistics) -> Contender:
    title = "`scipy.linalg.sqrtm`"
    try:
        from scipy import linalg
    except ImportError as error:
        return Contender(title, lambda: None, failed=str(error))
    first, second = a.covariance.numpy(), b.covariance.numpy()

    def run() -> float:
        root = linalg.sqrtm(first @ second)
        within = first.trace() + second.trace() - 2 * root.trace().real
        return float((a.mean - b.mean).square().sum()) + float(within)

    return Contender(title, run, rounds=1)


def _features(arguments: Arguments) -> Table:
    oracle, failed = _torch_fidelity()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.feature_batch, 3, _SIZE, _SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    contenders = []
    if oracle is not None:
        network = Inception(oracle.state_dict())
        contenders.append(Contender("ours", torch.no_grad()(lambda: network(images))))
        contenders.append(Contender("torch-fidelity", torch.no_grad()(lambda: oracle(images)[0])))
        _take_turns(contenders, arguments.repeats)
    else:
        contenders.append(Contender("torch-fidelity", lambda: None, failed=failed))
    rows = []
    for contender in contenders:
        if contender.failed is not None:
            rows.append([contender.title, f"not installed: {contender.failed}", "", ""])
            continue
        expected = contenders[-1].result
        away = float((contender.result - expected).abs().max() / expected.abs().max())
        rate = _rates(contender, arguments.feature_batch)
        rows.append([contender.title, rate, _ratio(contenders[0], contender), f"{away:.1e}"])
    title = f"Inception features of {_SIZE}x{_SIZE} images, batch {arguments.feature_batch}"
    return title, ["extractor", "images/s", "ours / this", "relative difference"], rows, contenders


def _torch_fidelity() -> tuple[Any, str | None]:
    """Its extractor with random weights; None and the reason if it is not there."""
    try:
        stand_in_for_torchvision()
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except ImportError as error:
        return None, str(error)

    class RandomInception(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, _nothing: object) -> None:
            generator = torch.Generator().manual_seed(1)
            for value in self.state_dict().values():
                if value.ndim == 4:
                    value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)

    module.load_state_dict_from_url = lambda *_args, **_kwargs: {}
    return RandomInception("random", ["2048"]), None


def _sampling(arguments: Arguments) -> Table:
    batch, steps = arguments.batch, arguments.steps
    network, call = NETWORKS[OURS].build(None)
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    schedule, timesteps = make_schedule("linear", T=1000), sampling_timesteps(1000, steps)
    x_T = torch.randn(batch, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    x_T = x_T.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def sample() -> None:
        ddim(call, schedule, x_T, timesteps=timesteps, noise_at=lambda i: x_T)

    @torch.inference_mode()
    def bare() -> None:
        for t in timesteps:
            call(x_T, torch.full((batch,), t))

    ours = Contender(f"ours, DDIM-{steps}", sample)
    contenders = [ours, Contender(f"ours, {steps} bare forward passes", bare), _pipeline(batch, steps)]
    _take_turns(contenders, arguments.repeats)
    rows = [[c.title, _rates(c, batch), _ratio(ours, c)] for c in contenders]
    title = f"CIFAR-10 network, batch {batch}, {steps} network evaluations an image"
    return title, ["sampling", "images/s", "ours / this"], rows, contenders


def _pipeline(batch: int, steps: int) -> Contender:
    title = "diffusers `DDIMPipeline`"
    try:
        from diffusers import DDIMPipeline, DDIMScheduler

        network, _ = NETWORKS["diffusers"].build(None)
    except ImportError as error:
        return Contender(title, lambda: None, failed=str(error))
    pipeline = DDIMPipeline(unet=network.eval(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return Contender(title, lambda: pipeline(batch_size=batch, num_inference_steps=steps, output_type="np"))


_PARTS: dict[str, Callable[[Arguments], Table]] = {
    "frechet": _frechet,
    "features": _features,
    "sampling": _sampling,
}

if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
