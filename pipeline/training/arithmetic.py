"""How numbers are computed on a device: precision, and algorithms that give the same bits when asked again."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pipeline.config import ComputeConfig

__all__ = ["Arithmetic", "make_optimizer", "settle_device"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def settle_device(compute: ComputeConfig, device: torch.device, *, num_threads: int) -> None:
    """Sets what torch keeps globally, before anything is computed.

    A resumed run must repeat the bits of the unbroken one: cuDNN may not choose algorithms by timing them, and torch
    takes the deterministic form of an operation wherever there is one.
    """
    torch.set_num_threads(num_threads)
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.backends.cuda.matmul.allow_tf32 = compute.tf32
    torch.backends.cudnn.allow_tf32 = compute.tf32
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs a pass over memory


def make_optimizer(unet: nn.Module, *, lr: float, eps: float, device: torch.device) -> torch.optim.Adam:
    """Adam as one fused kernel: one pass over weights, gradients and moments instead of a dozen."""
    return torch.optim.Adam(unet.parameters(), lr=lr, eps=eps, fused=device.type in ("cpu", "cuda") or None)


class Arithmetic:
    """Autocast and, for float16, the scaling of the loss.

    Weights, their gradients, the optimizer and the averages are float32 whatever the precision; schedule tables are
    float64. float16 has gradients too small for its range: the loss is scaled up, the gradients down again, and a step
    whose gradients overflow is left out and the scale halved.
    """

    def __init__(self, compute: ComputeConfig, device: torch.device) -> None:
        self._device_type = device.type
        self._dtype = _DTYPES.get(compute.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=compute.precision == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """Where the network is called."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled if the precision needs it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        """Unscales and clips the gradients and takes the optimizer's step.

        Args:
            optimizer: Over ``parameters``.
            parameters: Parameters with gradients, summed over all workers already.
            max_norm: Largest norm of all gradients together; infinity does not clip.

        Returns:
            The norm before clipping, a scalar on the device. Not finite if float16 overflowed: that step was left out.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm.detach()

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite is part of the method and no sign of divergence."""
        return self.scaler.is_enabled()
