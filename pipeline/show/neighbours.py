"""The training images that are nearest to a sample: does the model draw, or remember?"""

import torch
from torch import Tensor

from pipeline.data.shards import read_images
from pipeline.show.subject import DataSet

__all__ = ["MOST_IMAGES", "nearest"]

MOST_IMAGES = 50_000
"""Images of a data set that are looked at: all of CIFAR-10."""


def nearest(samples: Tensor, data: DataSet, count: int) -> tuple[Tensor, int]:
    """The nearest images of a data set by the distance of pixels, shard by shard.

    Args:
        samples: uint8 [B, C, H, W].
        data: Where to look.
        count: Neighbours of each sample.

    Returns:
        The neighbours, nearest first, uint8 [B, count, C, H, W], and how many images were looked at.
    """
    best = torch.full((len(samples), count), torch.inf)
    images = torch.zeros(len(samples), count, *samples.shape[1:], dtype=torch.uint8)
    wanted, seen = samples.float().flatten(1), 0
    for shard in range(len(data.manifest.shards)):
        found = read_images(data.location, data.manifest, shard)
        distances = torch.cdist(wanted, found.float().flatten(1))
        together = torch.cat([best, distances], dim=1)
        best, places = together.topk(count, dim=1, largest=False)
        for row, row_places in enumerate(places):
            pool = torch.cat([images[row], found])
            images[row] = pool[row_places]
        seen += len(found)
        if seen >= MOST_IMAGES:
            break
    return images, seen
