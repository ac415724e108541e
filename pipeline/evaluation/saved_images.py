"""Generated images as a data set of shards, in the format that training reads."""

import io
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline import storage
from pipeline.data.manifest import index_name, shard_name
from pipeline.data.prepare import Finished, claim, finished_shard, write_manifest
from pipeline.data.shards import encode_shard, index_shard
from pipeline.data.sources import Sample
from pipeline.errors import WorldError
from pipeline.evaluation.gathering import Chunk

__all__ = ["SavedImages"]

_IMAGES_PER_SHARD = 1000
_SHARD_BYTES = 64 * 2**20  # of pixels: what fills no shard yet is part of what an evaluation keeps


class SavedImages:
    """Writes shards as images come in; the manifest comes last."""

    def __init__(
        self,
        location: str,
        *,
        source: str,
        identity: str,
        class_names: Sequence[str],
        labels_of: Callable[[Chunk], Tensor] | None,
    ) -> None:
        """Marks the folder as ours.

        Args:
            location: The data set's folder.
            source: Where the images come from, in words.
            identity: Identity of the images: the same one gives the same bytes.
            class_names: Names of the labels.
            labels_of: The labels of a chunk's images, int64 [n]; None if they have none.

        Raises:
            UserError: The folder holds something else.
        """
        self.location, self._source, self._identity = location, source, identity
        self._class_names, self._labels_of = tuple(class_names), labels_of
        self.is_finished = claim(location, source, identity) is not None
        self._num_shards = self._num_images = 0
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk and writes the shards that are full."""
        assert chunk.images is not None
        self._images.append(chunk.images)
        none = torch.full((len(chunk.images),), -1, dtype=torch.int64)
        self._labels.append(self._labels_of(chunk) if self._labels_of else none)
        size = max(1, min(_IMAGES_PER_SHARD, _SHARD_BYTES // chunk.images[0].numel()))
        while sum(map(len, self._images)) >= size:
            self._write_shard(size)

    def finish(self) -> None:
        """Writes what is left and the manifest, after which the folder is a data set."""
        if self.is_finished:
            return
        if (left := sum(map(len, self._images))) > 0:
            self._write_shard(left)
        finished = []
        for number in range(self._num_shards):
            index = finished_shard(self.location, number, shard_name(number))
            if index is None:
                raise WorldError(f"{storage.join(self.location, shard_name(number))} is gone or damaged")
            finished.append(Finished(number, shard_name(number), index, written=True))
        ((_, size, _, channels), *_) = finished[0].index.kinds
        write_manifest(
            self.location,
            finished,
            source=self._source,
            source_fingerprint=self._identity,
            image_size=size,
            image_channels=channels,
            class_names=self._class_names if self._labels_of else (),
        )
        self.is_finished = True

    def to_tensors(self) -> dict[str, Tensor]:
        """Images that fill no shard yet, and how many shards and images are written."""
        written = torch.tensor([self._num_shards, self._num_images])
        if not self._images:
            return {"written": written}
        return {"written": written, "images": torch.cat(self._images), "labels": torch.cat(self._labels)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the state that ``to_tensors`` gave. Raises ``WorldError`` if a written shard is gone."""
        self._num_shards, self._num_images = tensors["written"].tolist()
        if "images" in tensors:
            self._images, self._labels = [tensors["images"]], [tensors["labels"]]
        for number in range(self._num_shards):
            if finished_shard(self.location, number, shard_name(number)) is None:
                raise WorldError(f"{storage.join(self.location, shard_name(number))} is gone or damaged")

    def _write_shard(self, size: int) -> None:
        images, labels = torch.cat(self._images), torch.cat(self._labels)
        rows = zip(images[:size], labels[:size].tolist(), strict=True)
        samples = [
            Sample(f"{self._num_images + place:08d}", image, None if label < 0 else label)
            for place, (image, label) in enumerate(rows)
        ]
        name = shard_name(self._num_shards)
        data = encode_shard(samples)
        storage.write_bytes(storage.join(self.location, name), data)
        index = index_shard(name, io.BytesIO(data))
        storage.write_bytes(storage.join(self.location, index_name(self._num_shards)), index.to_json())
        self._num_shards += 1
        self._num_images += size
        left = len(images) > size
        self._images, self._labels = ([images[size:]], [labels[size:]]) if left else ([], [])
