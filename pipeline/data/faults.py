"""Damage in a data set, told so that a person finds it."""

from pipeline.errors import WorldError

__all__ = ["DataError", "TooMuchDamageError"]


class DataError(WorldError):
    """Something in a data set is missing or damaged, and reading it again would give the same.

    Args:
        shard: Name or location of the shard.
        reason: What is wrong.
        key: The image; None when the shard as a whole is meant.
        offset: Where the image begins in the shard, bytes.
    """

    def __init__(self, shard: str, reason: str, *, key: str | None = None, offset: int | None = None) -> None:
        """Puts the parts into one line."""
        place = "" if key is None else f", image {key} at byte {offset}"
        super().__init__(f"shard {shard}{place}: {reason}")
        self.shard, self.reason, self.key, self.offset = shard, reason, key, offset

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes with its parts."""
        return _rebuild, (self.shard, self.reason, self.key, self.offset)


def _rebuild(shard: str, reason: str, key: str | None, offset: int | None) -> DataError:
    return DataError(shard, reason, key=key, offset=offset)


class TooMuchDamageError(WorldError):
    """More of the data set is damaged than the user accepts."""

    def __init__(self, num_bad: int, num_images: int, allowed: float) -> None:
        """Says how much."""
        super().__init__(
            f"{num_bad} of the {num_images} images of an epoch are missing or damaged, more than "
            f"--max-bad-fraction {allowed:g}; repair the data set (jobs/prepare_data.py --verify lists the damage)"
        )
        self._parts = (num_bad, num_images, allowed)

    def __reduce__(self) -> tuple[object, ...]:
        """Crosses processes with its parts."""
        return TooMuchDamageError, self._parts
