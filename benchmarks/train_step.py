"""Speed of our network's training step beside others: ``python benchmarks/train_step.py --help``.

All contenders live in one process and take turns, one step each: what else the machine does meets all alike. Peers that
are not installed are named in the result.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from networks import NETWORKS, OURS, make_adam, num_parameters
from report import machine, markdown, spread, version_of

_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measures forward + backward + Adam of the CIFAR-10 network, images/s, and forward alone."""

    batch: tuple[int, ...] = (8,)
    """Images of a step; several sizes are measured one after another."""
    repeats: int = 15
    """Steps of each contender, in rounds, after one that is not counted."""
    threads: int = 2
    """Threads of torch."""
    clock: str = "wall"
    """wall: seconds that pass; cpu: seconds of computing, all threads together, for a machine that is busy."""
    networks: tuple[str, ...] = tuple(NETWORKS)
    """Whom to measure; ours is always measured."""
    improved_diffusion: Path | None = None
    """A clone of openai/improved-diffusion."""
    out: Path | None = None
    """File for all measurements, as JSON."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.networks) - set(NETWORKS))
        if unknown:
            raise SystemExit(f"no network is called {' or '.join(unknown)}; give some of {', '.join(NETWORKS)}")
        if self.clock not in _CLOCKS:
            raise SystemExit(f"--clock {self.clock}: use wall or cpu")
        if self.repeats < 1 or self.threads < 1 or not self.batch or min(self.batch) < 1:
            raise SystemExit("--repeats, --threads and --batch take at least 1")


_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Result:
    """Seconds of each step of a contender."""

    name: str
    batch: int
    parameters: int = 0
    version: str | None = None
    step_seconds: list[float] = field(default_factory=list)
    forward_seconds: list[float] = field(default_factory=list)
    failed: str | None = None


def main(arguments: Arguments) -> None:
    """Measures everything and prints the tables."""
    torch.set_num_threads(arguments.threads)
    facts = machine()
    names = [name for name in NETWORKS if name == OURS or name in arguments.networks]
    results = []
    for batch in arguments.batch:
        found = _measure(names, batch, arguments)
        print(f"Batch {batch}, {arguments.threads} threads, {arguments.clock} clock, {arguments.repeats} repeats:\n")
        print(markdown(_HEAD, [_row(result, found[0]) for result in found], facts) + "\n", flush=True)
        results += found
    if arguments.out is not None:
        record = {"machine": facts, "clock": arguments.clock, "results": [asdict(result) for result in results]}
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def _measure(names: list[str], batch: int, arguments: Arguments) -> list[Result]:
    results = [Result(name, batch) for name in names]
    steps = {result.name: _prepare(result, arguments) for result in results}
    clock = _CLOCKS[arguments.clock]
    for number in range(arguments.repeats + 1):
        # Another one begins each round.
        turn = number % len(results)
        for result in results[turn:] + results[:turn]:
            if (step := steps[result.name]) is None:
                continue
            started = clock()
            step(True)
            trained = clock()
            step(False)
            if number > 0:  # the first step also allocates the optimizer's moments
                result.step_seconds.append(trained - started)
                result.forward_seconds.append(clock() - trained)
        print(f"batch {batch}: round {number} of {arguments.repeats} done", file=sys.stderr, flush=True)
    return results


def _prepare(result: Result, arguments: Arguments) -> Callable[[bool], None] | None:
    """Builds a contender; None, and the reason in the result, if it is not there.

    Returns:
        A function that trains one step (True) or predicts without gradients (False).
    """
    contender = NETWORKS[result.name]
    try:
        network, call = contender.build(arguments.improved_diffusion)
    except ImportError as error:
        result.failed = str(error)
        return None
    result.parameters = num_parameters(network)
    result.version = version_of(contender.package) if contender.package else None
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format
    network.to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = make_adam(contender, network)
    generator = torch.Generator().manual_seed(0)
    shape = (result.batch, 3, _SIZE, _SIZE)
    x_t, eps = (torch.randn(shape, generator=generator).to(memory_format=layout) for _ in range(2))
    t = torch.randint(1000, (result.batch,), generator=generator)

    def step(train: bool) -> None:
        if not train:
            with torch.no_grad():
                call(x_t, t)
            return
        optimizer.zero_grad(set_to_none=True)
        (call(x_t, t) - eps).square().mean().backward()
        optimizer.step()

    return step


_HEAD = ["network", "parameters, M", "train step, images/s", "ours / this", "forward, images/s", "ours / this"]


def _row(result: Result, ours: Result) -> list[str]:
    title = NETWORKS[result.name].title + (f", {result.version}" if result.version else "")
    if result.failed:
        return [title, "", f"not installed: {result.failed.replace('|', '/')}", "", "", ""]

    def speeds(part: Callable[[Result], list[float]]) -> list[str]:
        rates: Any = spread([result.batch / seconds for seconds in part(result)], ".2f")
        # The rounds are pairs: the ratio is taken within each, so that a slow minute cancels.
        ratios = [theirs / own for theirs, own in zip(part(result), part(ours), strict=True)]
        return [rates, f"{statistics.median(ratios):.2f}"]

    step, forward = speeds(lambda r: r.step_seconds), speeds(lambda r: r.forward_seconds)
    return [title, f"{result.parameters / 1e6:.2f}", *step, *forward]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
