"""What an evaluation did: results, failures, and what it left alone and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Evaluation", "Failure", "Outcome", "Skipped"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One checkpoint's result."""

    run: str
    step: int
    model_id: str
    weights: str
    metric: str
    value: float
    num_images: int
    identity: str
    seconds: float
    images: str | None = None
    """Where the images were saved as a data set."""
    note: str | None = None
    """What makes the number worth less than it looks."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All values that were measured, by the names under which they are logged."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A checkpoint that could not be evaluated, and why; it stays pending."""

    run: str
    step: int
    reason: str
    unreachable: bool = False
    """Whether a server was away: nothing is wrong with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A checkpoint, or all of a run, that was not tried, and why."""

    run: str
    step: int | None
    reason: str

    @property
    def name(self) -> str:
        """In words."""
        return self.run if self.step is None else f"{self.run} step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an evaluation did."""

    evaluated: Sequence[Evaluation] = ()
    failed: Sequence[Failure] = ()
    skipped: Sequence[Skipped] = ()
    champion: str | None = None
    """What became of the alias, in words."""

    @property
    def exit_code(self) -> int:
        """1 if a checkpoint failed."""
        return 1 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """The result of ``--json``."""
        return {
            "evaluated": [asdict(entry) for entry in self.evaluated],
            "failed": [asdict(entry) for entry in self.failed],
            "skipped": [asdict(entry) for entry in self.skipped],
            "champion": self.champion,
            "exit_code": self.exit_code,
        }

    def text(self) -> str:
        """A line for each checkpoint."""
        lines = []
        for entry in self.evaluated:
            value = f"{entry.metric} {entry.value:.4f} on {entry.num_images} images"
            lines.append(f"{entry.run} step {entry.step}: {value}")
            lines += [f"  {name} {value:.5g}" for name, value in entry.metrics.items() if name != entry.metric]
            lines += [f"images of {entry.run} step {entry.step}: {entry.images}"] if entry.images else []
        lines += [f"to know: {note}" for note in dict.fromkeys(entry.note for entry in self.evaluated) if note]
        lines += [f"{failure.run} step {failure.step} failed: {failure.reason}" for failure in self.failed]
        lines += [f"{entry.name} skipped: {entry.reason}" for entry in self.skipped]
        lines += [self.champion] if self.champion else []
        return "\n".join(lines) or "nothing to do: every selected checkpoint has this result"
