"""Training steps on a GPU: precision, torch.compile, batch sweep and MFU: ``python benchmarks/gpu.py --help``.

Runs wherever torch sees a GPU; elsewhere it says so and measures nothing. Ours and the peers' networks take turns,
in one process.
"""

import contextlib
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro
from networks import NETWORKS, OURS, make_adam
from report import machine, markdown, spread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_SIZE = 32
# Dense bfloat16 products, FLOP/s, from the vendor's data sheets; TF32 is half of it on these chips. The first that is
# found in the device's name counts.
_PEAK = {
    r"H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L40\b": 181e12,
    r"L4\b": 121e12,
    r"A10G": 70e12,
    r"A10\b": 125e12,
    r"4090\b": 165e12,
}
_PRECISIONS = ("tf32", "bf16", "bf16+compile")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures forward + backward + Adam of the CIFAR-10 network on a GPU, images/s and MFU."""

    batch: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Images of a step, one size after another."""
    precisions: tuple[str, ...] = _PRECISIONS
    """tf32, bf16 and bf16+compile (ours alone is compiled)."""
    networks: tuple[str, ...] = (OURS, "diffusers", "improved-diffusion")
    """Whom to measure."""
    repeats: int = 20
    """Steps of each contender that count, in rounds, after the warm-up."""
    warmup: int = 5
    """Steps of each contender before, alone."""
    device: str = "cuda"
    """cpu tries the script out where there is no GPU; its numbers say nothing."""
    improved_diffusion: Path | None = None
    """A clone of openai/improved-diffusion."""
    out: Path | None = None
    """File for all measurements, as JSON."""

    def __post_init__(self) -> None:
        if unknown := sorted((set(self.precisions) - set(_PRECISIONS)) | (set(self.networks) - set(NETWORKS))):
            raise SystemExit(f"{' and '.join(unknown)}: --precisions takes {_PRECISIONS}, --networks {tuple(NETWORKS)}")


@dataclass
class Result:
    """Seconds of each step of a contender."""

    name: str
    batch: int
    precision: str
    flops: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str | None = None


def main(arguments: Arguments) -> None:
    """Measures everything and prints the table."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("GPU: torch sees none on this machine; skipped.")
        return
    facts = machine()
    if arguments.device == "cuda":
        facts["cpu"] = f"{torch.cuda.get_device_name()}; {facts['cpu']}"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    results: list[Result] = []
    for precision in arguments.precisions:
        for batch in arguments.batch:
            results += _measure(precision, batch, arguments)
            print(f"{precision}, batch {batch} done", file=sys.stderr, flush=True)
            if arguments.out is not None:
                record = {"machine": facts, "results": [asdict(result) for result in results]}
                arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(markdown(_HEAD, [_row(result, results) for result in results], facts))


def _measure(precision: str, batch: int, arguments: Arguments) -> list[Result]:
    names = [name for name in arguments.networks if name == OURS or precision != "bf16+compile"]
    results = [Result(name, batch, precision) for name in names]
    steps = {result.name: _prepare(result, arguments) for result in results}
    for number in range(arguments.repeats):
        turn = number % len(results)
        for result in results[turn:] + results[:turn]:
            if (step := steps[result.name]) is None:
                continue
            try:
                started = time.perf_counter()
                step()
                result.step_seconds.append(time.perf_counter() - started)
            except torch.OutOfMemoryError:
                result.failed, steps[result.name] = "out of memory beside the others", None
    steps.clear()
    _free_memory(arguments.device)
    return results


def _prepare(result: Result, arguments: Arguments) -> Callable[[], None] | None:
    """A contender's step, warmed up; None if it cannot take part. What it alone needs of memory is noted."""
    before = torch.cuda.memory_allocated() if arguments.device == "cuda" else 0
    try:
        step = _step(result, arguments)
        for _ in range(arguments.warmup):
            step()
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            result.peak_bytes = torch.cuda.max_memory_allocated() - before
        return step
    except ImportError as error:
        result.failed = f"not installed: {error}"
    except torch.OutOfMemoryError:
        result.failed = "out of memory"
    _free_memory(arguments.device)
    return None


def _free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _step(result: Result, arguments: Arguments) -> Callable[[], None]:
    contender = NETWORKS[result.name]
    device = torch.device(arguments.device)
    network, call = contender.build(arguments.improved_diffusion)
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    network.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
    if result.precision == "bf16+compile":
        # Another batch size is another network to the compiler; else it would compile one for all of them.
        torch._dynamo.reset()
        network.compile(dynamic=False)
    optimizer = make_adam(contender, network)
    shape = (result.batch, 3, _SIZE, _SIZE)
    x_t, eps = (torch.randn(shape, device=device).to(memory_format=layout) for _ in range(2))
    t = torch.randint(1000, (result.batch,), device=device)
    result.flops = _flops(contender.build(arguments.improved_diffusion)[0]) * result.batch

    def autocast() -> contextlib.AbstractContextManager[object]:
        if result.precision == "tf32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            prediction = call(x_t, t)
        (prediction.float() - eps).square().mean().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _flops(network: nn.Module) -> float:
    """Of one image's forward and backward pass, counted on shapes alone: products and sums are one operation each."""
    network.to("meta")
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        output = network(torch.empty(1, 3, _SIZE, _SIZE), torch.zeros(1, dtype=torch.int64))
        getattr(output, "sample", output).sum().backward()
    return float(counter.get_total_flops())


_HEAD = ["network", "precision", "batch", "images/s", "ours / this", "TFLOP/s", "MFU, %", "peak memory, GiB"]


def _row(result: Result, results: list[Result]) -> list[str]:
    title, batch = NETWORKS[result.name].title, f"{result.batch}"
    if result.failed or not result.step_seconds:
        return [title, result.precision, batch, (result.failed or "").replace("|", "/"), "", "", "", ""]
    ours = next(
        each for each in results if (each.name, each.batch, each.precision) == (OURS, result.batch, result.precision)
    )
    ratios = [theirs / own for theirs, own in zip(result.step_seconds, ours.step_seconds, strict=False)]
    rate = result.flops / statistics.median(result.step_seconds)
    peak = _peak(result.precision)
    return [
        title,
        result.precision,
        batch,
        spread([result.batch / seconds for seconds in result.step_seconds]),
        spread(ratios, ".2f") if ratios else "",
        f"{rate / 1e12:.2f}",
        f"{100 * rate / peak:.1f}" if peak else "",
        f"{result.peak_bytes / 2**30:.1f}",
    ]


def _peak(precision: str) -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    dense = next((peak for chip, peak in _PEAK.items() if re.search(chip, name)), None)
    return dense and (dense / 2 if precision == "tf32" else dense)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
