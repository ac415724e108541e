"""The metrics of a run for Prometheus: Ray exports them from the driver's node, beside its own."""

from ray.util.metrics import Gauge

from pipeline.training.worker import Record

__all__ = ["GAUGES", "Gauges"]

GAUGES = {
    "ddpm_training": "1 from the start of the driver to the last step, also while it waits for GPUs; then 0.",
    "ddpm_step": "Optimizer steps done.",
    "ddpm_loss": "Training loss, mean of the last logging window over all workers.",
    "ddpm_images_per_second": "Images trained on, per second, all workers together.",
    "ddpm_data_wait_ratio": "Part of the time that rank 0 waited for images, 0..1.",
    "ddpm_bad_images": "Damaged images that were replaced since this driver started.",
    "ddpm_distance": "Last rough Frechet distance of a published checkpoint.",
}
"""Name and meaning of each gauge. Ray exports them as ``ray_NAME`` with the label ``run``."""

_KEYS = {
    "ddpm_step": "step",
    "ddpm_loss": "train/loss",
    "ddpm_images_per_second": "perf/images_per_second",
    "ddpm_data_wait_ratio": "perf/data_wait_ratio",
}


class Gauges:
    """A ``Progress`` that nobody looks at but Prometheus. Costs nothing where no metrics are collected."""

    def __init__(self, run: str) -> None:
        """Registers the gauges.

        Args:
            run: The run's name, the value of the label ``run``.
        """
        self._gauges = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._bad_images = 0.0
        self._gauges["ddpm_training"].set(1)

    def show(self, record: Record) -> None:
        """Sets the gauges to the values of one logging window."""
        for name, key in _KEYS.items():
            self._gauges[name].set(record[key])
        self._bad_images += record.get("data/bad_images", 0.0)
        self._gauges["ddpm_bad_images"].set(self._bad_images)

    def show_distance(self, value: float) -> None:
        """Sets the distance."""
        self._gauges["ddpm_distance"].set(value)

    def end(self) -> None:
        """Says that no more steps come: what follows (publishing, an evaluation) may take long."""
        self._gauges["ddpm_training"].set(0)

    def close(self) -> None:
        """Ends; the other values stay until the driver ends."""
        self.end()
