"""What is gathered from an evaluation's chunks, kept in storage while it grows: a killed evaluation goes on from there.

Chunks are added in the order of their numbers and the state after chunk c is a function of chunks 0 to c, so that an
evaluation that was killed and continued ends with the same bits as one that was not.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline import storage
from pipeline.errors import WorldError
from pipeline.evaluation.statistics import FeatureStatistics

__all__ = ["Accumulator", "Chunk", "Gathering", "Moments", "OfFeatures"]

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LARGEST_SHARE = 0.05
"""Largest part of the time that may go into keeping the state."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The images of a chunk that count, n of them: of the last chunk only those up to the wanted number."""

    number: int
    features: Tensor
    """float32 [n, d]."""
    images: Tensor | None
    """uint8 [n, C, H, W], if somebody asked for them."""


class Accumulator(Protocol):
    """Something that grows with every chunk and whose state is tensors."""

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk; the first one has number 0, and none is left out."""
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """The state after the chunks so far."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the state that ``to_tensors`` gave. Raises ``WorldError`` for another one."""
        ...


class Moments:
    """Mean and covariance of the features, as sums in float64."""

    def __init__(self, dim: int) -> None:
        self.statistics = FeatureStatistics.empty(dim)

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk. Raises ``WorldError`` for features that are not finite."""
        self.statistics.update(chunk.features.to(torch.float64))

    def to_tensors(self) -> dict[str, Tensor]:
        """The state after the chunks so far."""
        return self.statistics.to_tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the state that ``to_tensors`` gave. Raises ``WorldError`` for another one."""
        found = FeatureStatistics.from_tensors(tensors)
        if found.dim != self.statistics.dim:
            raise WorldError(f"its features have length {found.dim}, not {self.statistics.dim}")
        self.statistics = found


class _Growing(Protocol):
    """Something that grows with features and whose state is tensors."""

    def update(self, features: Tensor) -> None: ...

    def to_tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


G = TypeVar("G", bound=_Growing)


class OfFeatures(Generic[G]):
    """An accumulator of something that looks at a chunk's features alone."""

    def __init__(self, inner: G) -> None:
        self.inner = inner

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk."""
        self.inner.update(chunk.features)

    def to_tensors(self) -> dict[str, Tensor]:
        """The state after the chunks so far."""
        return self.inner.to_tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the state that ``to_tensors`` gave. Raises ``WorldError`` for another one."""
        self.inner.restore(tensors)


class Gathering:
    """Accumulators by name, and how far they are; the state is one file, written whole or not at all."""

    def __init__(self, key: Mapping[str, str], make: Callable[[], Mapping[str, Accumulator]]) -> None:
        """Goes on where an evaluation of the same key was killed, if there is something to go on with.

        Args:
            key: What the state belongs to: model, weights, protocol.
            make: Makes the accumulators, empty.

        Raises:
            WorldError: Storage refused or did not answer.
        """
        self.key = storage.sha256_hex(json.dumps(dict(key), sort_keys=True).encode())[:32]
        self.location = storage.join(storage.home(), "evaluations", f"{self.key}.safetensors")
        self.accumulators = make()
        self.next_chunk = 0
        self._kept, self._kept_at, self._seconds = 0, 0.0, 0.0
        try:
            self._restore()
        except WorldError as error:
            logger.warning("%s cannot be continued and is made anew: %s", self.location, error)
            self.accumulators, self.next_chunk = make(), 0

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk and keeps the state, unless it was kept a moment ago."""
        assert chunk.number == self.next_chunk
        for accumulator in self.accumulators.values():
            accumulator.add(chunk)
        self.next_chunk += 1
        if time.monotonic() - self._kept_at >= self._seconds / _LARGEST_SHARE:
            self.keep()

    def keep(self) -> None:
        """Writes the state. Raises ``WorldError`` if storage refuses or does not answer."""
        if self._kept == self.next_chunk:
            return
        began = time.monotonic()
        storage.write_bytes(self.location, self._encode())
        self._kept, self._kept_at = self.next_chunk, time.monotonic()
        self._seconds = self._kept_at - began

    def discard(self) -> None:
        """Removes the state from storage."""
        storage.remove(self.location)

    def _encode(self) -> bytes:
        tensors = {
            f"{name}.{part}": tensor.contiguous()
            for name, accumulator in self.accumulators.items()
            for part, tensor in accumulator.to_tensors().items()
        }
        meta = {
            "format_version": str(_FORMAT_VERSION),
            "key": self.key,
            "next_chunk": str(self.next_chunk),
            "sha256": storage.sha256_hex(safetensors.torch.save(tensors)),
        }
        return safetensors.torch.save(tensors, metadata=meta)

    def _restore(self) -> None:
        try:
            data = storage.read_bytes(self.location)
        except FileNotFoundError:
            return
        tensors, meta = _decode(data)
        if meta.get("format_version") != str(_FORMAT_VERSION) or meta.get("key") != self.key:
            raise WorldError("it belongs to something else")
        if meta.get("sha256") != storage.sha256_hex(safetensors.torch.save(tensors)):
            raise WorldError("it is damaged")
        for name, accumulator in self.accumulators.items():
            parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            if not parts:
                raise WorldError(f"it was kept without {name}")
            accumulator.restore(parts)
        self.next_chunk = self._kept = int(meta["next_chunk"])


def _decode(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise WorldError(f"it is truncated or damaged: {error}") from error
    meta: dict[str, str] = header.get("__metadata__", {})
    return tensors, meta
