"""Named sets of defaults. ``digits`` is the quickstart; the others are the recipes of the DDPM paper's code.

Source of the paper's values: hojonathanho/diffusion, ``scripts/run_cifar.py``, ``run_lsun.py`` and ``run_celebahq.py``.
"""

from typing import Any

from pipeline.config import TrainConfig, override

__all__ = ["PRESETS", "preset"]

_PAPER: dict[str, Any] = {
    "image_channels": 3,
    "base_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": [16],
    "schedule": "linear",
    "T": 1000,
    "lr_warmup_steps": 5000,
    "lr_decay": "constant",
    "grad_clip": 1.0,
    "ema_decay": 0.9999,
    "ema_warmup": False,
    "random_flip": True,
    "log_every": 100,
    "checkpoint_every": 10_000,
    "grid_images": 64,
}

_PAPER_256: dict[str, Any] = _PAPER | {
    "image_size": 256,
    "channel_mult": [1, 1, 2, 2, 4, 4],
    "dropout": 0.0,
    "batch_size": 64,
    "lr": 2e-5,
    "variance": "fixed-small",
    "grid_images": 16,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 0.7 M parameters, 8x8 grey digits: readable samples after about a minute on two CPU cores.
    "digits": {},
    # 35.7 M parameters, 32x32 RGB: the paper's CIFAR-10 run of 800k steps.
    "cifar10": _PAPER
    | {
        "image_size": 32,
        "channel_mult": [1, 2, 2, 2],
        "dropout": 0.1,
        "batch_size": 128,
        "lr": 2e-4,
        "steps": 800_000,
        "variance": "fixed-large",
        "data": "cifar10",
    },
    # 113.7 M parameters, 256x256 RGB: the paper's LSUN Church run.
    "lsun256": _PAPER_256 | {"steps": 1_200_000, "data": "lsun256"},
    # The same network on CelebA-HQ.
    "celebahq256": _PAPER_256 | {"steps": 500_000, "data": "celebahq256"},
}
"""Leaf values of each preset, over the defaults of ``TrainConfig`` (which are those of ``digits``)."""


def preset(name: str) -> TrainConfig:
    """The defaults of a preset."""
    return override(TrainConfig(), PRESETS[name] | {"preset": name})
