"""The least that trains the same network on the same number of processes: PyTorch alone, images in memory.

No Ray, MLflow, EMA, log, checkpoint or files. ``training.py`` runs it beside ``jobs/train.py``.
"""

import json
import socket
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import TrainConfig, override
from pipeline.diffusion.process import q_sample
from pipeline.model_folder import build_schedule, build_unet
from pipeline.presets import preset


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Trains.

    Args:
        arguments: ``preset``, ``knobs``, ``workers``, and ``first`` and ``last``: the steps between which time counts.
    """
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_process, (arguments, port, results), nprocs=arguments["workers"])
    found: dict[str, Any] = results.get()
    return found


def _process(rank: int, arguments: dict[str, Any], port: int, results: Any) -> None:
    torch.set_num_threads(1)
    workers = arguments["workers"]
    config: TrainConfig = override(preset(arguments["preset"]), arguments["knobs"])
    schedule = build_schedule(config.diffusion)
    unet = build_unet(config.model, seed=0).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    model: nn.Module = unet
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
        model = DistributedDataParallel(unet, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.optimizer.lr, fused=True)
    size = config.model.image_size
    images = torch.rand(1024, config.model.image_channels, size, size).mul_(2).sub_(1)
    images = images.contiguous(memory_format=torch.channels_last)
    batch = config.data.batch_size // workers
    begun = 0.0
    for step in range(arguments["last"]):
        if step == arguments["first"]:
            begun = time.monotonic()
        x_0 = images[torch.randint(len(images), (batch,))]
        t = torch.randint(config.diffusion.T, (batch,))
        eps = torch.randn_like(x_0)
        optimizer.zero_grad(set_to_none=True)
        (model(q_sample(schedule, x_0, t, eps), t) - eps).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        if step == 0:
            first_step_at = time.time()
    if rank == 0:
        results.put({"seconds": time.monotonic() - begun, "first_step_at": first_step_at})
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
