"""The Inception-v3 network of 2015 whose features define the FID, written out so that nothing else is needed to run it.

It differs from the Inception-v3 of the model zoos: other weights, average pools that leave the padding out, a max pool
in the last block, and the image resize of TensorFlow 1. Each of these moves the FID. Module names are those of the
public state dict (pytorch-fid and torch-fidelity publish the same bytes).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["DIM", "NUM_CLASSES", "RESIZE", "SHA256", "Inception", "resize_like_tensorflow1"]

DIM = 2048
NUM_CLASSES = 1008
RESIZE = "bilinear as in TensorFlow 1 (no half-pixel centres, no antialiasing) to 299x299, (x - 128) / 128"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_SIDE = 299


def resize_like_tensorflow1(x: Tensor, side: int) -> Tensor:
    """Resizes as ``tf.image.resize_bilinear(align_corners=False)`` of TensorFlow 1: pixel i comes from ``i * scale``.

    Bilinear interpolation is separable and linear, so it is two matrix products, several times faster than gathering.

    Args:
        x: Images, float [B, C, H, W].
        side: Height and width of the result, in pixels.

    Returns:
        Images, float [B, C, side, side].
    """
    rows, columns = (_interpolation_matrix(size, side, x) for size in x.shape[-2:])
    return rows @ x @ columns.T


def _interpolation_matrix(size: int, side: int, like: Tensor) -> Tensor:
    """The matrix [side, size] whose row i interpolates a line of ``size`` pixels at ``i * size / side``."""
    index = torch.arange(side, device=like.device)
    # TensorFlow takes the scale in float32; float64 would choose the other pixel where i * scale is nearly whole.
    position = index.float() * torch.tensor(size / side, dtype=torch.float32)
    low = position.long()
    high = (low + 1).clamp_max(size - 1)
    fraction = (position - low).to(like.dtype)
    matrix = like.new_zeros(side, size)
    matrix[index, low] += 1 - fraction
    matrix[index, high] += fraction
    return matrix


class Inception(nn.Module):
    """The network up to its last pool, batch norms folded into the convolutions, always in evaluation mode.

    Args:
        state_dict: The public state dict: 94 convolutions with their batch norms, and the classifier (``fc.weight``).

    Raises:
        ValueError: Keys are missing, unknown, or of another shape.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), same=False)
        self.Mixed_5b = _BlockA(192, pool_channels=32)
        self.Mixed_5c = _BlockA(256, pool_channels=64)
        self.Mixed_5d = _BlockA(288, pool_channels=64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280)
        self.Mixed_7c = _BlockE(2048, max_pool=True)
        self.head: Tensor | None
        self.register_buffer("head", None)
        self._load(state_dict)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images, uint8 [B, 3, H, W] of any size, to features, float32 [B, 2048]."""
        x = (resize_like_tensorflow1(images.float(), _SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean((2, 3))
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the classifier without its bias, [B, 1008], as every implementation of the Inception score takes.

        Args:
            features: What ``forward`` gave, float32 [B, 2048].

        Raises:
            ValueError: The state dict has no classifier.
        """
        if self.head is None:
            raise ValueError("this state dict of the FID Inception-v3 has no classifier 'fc.weight'")
        return features.to(self.head.device) @ self.head.T

    def train(self, mode: bool = True) -> "Inception":
        """Stays in evaluation mode whatever is asked: statistics of the batch would change the features."""
        return super().train(False)

    def _load(self, state_dict: Mapping[str, Tensor]) -> None:
        given = {key: value for key, value in state_dict.items() if not key.startswith("fc.")}
        _check_keys(self.state_dict(), given)
        self.load_state_dict(given)
        self.eval().requires_grad_(False)
        self.double()  # fold in float64, so that each weight is rounded once
        for module in self.modules():
            if isinstance(module, _Conv):
                module.fold()
        self.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        head = state_dict.get("fc.weight")
        if head is not None and head.shape != (NUM_CLASSES, DIM):
            raise ValueError(f"the classifier 'fc.weight' has shape {list(head.shape)}, not {[NUM_CLASSES, DIM]}")
        self.head = None if head is None else head.detach().float().clone()


def _check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    # Counters of training steps: absent from files older than PyTorch 0.4.1, and of no use here.
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in expected]
    misshapen = [key for key, value in given.items() if key in expected and value.shape != expected[key].shape]
    for keys, trouble in ((missing, "missing"), (unknown, "unknown"), (misshapen, "of another shape")):
        if keys:
            raise ValueError(
                f"not a state dict of the FID Inception-v3: {len(keys)} keys are {trouble}, such as {keys[0]!r}"
            )


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless ``same`` is off; stride 2 never pads."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), *, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


def _average_pool(x: Tensor) -> Tensor:
    # TensorFlow divides by the number of real pixels under the window: the padding does not count.
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64)
        self.branch5x5_1 = _Conv(inputs, 48)
        self.branch5x5_2 = _Conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3))
        self.branch_pool = _Conv(inputs, pool_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3, self.branch_pool(_average_pool(x))], 1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = _Conv(96, 96, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 192)
        self.branch7x7_1 = _Conv(inputs, channels)
        self.branch7x7_2 = _Conv(channels, channels, (1, 7))
        self.branch7x7_3 = _Conv(channels, 192, (7, 1))
        self.branch7x7dbl_1 = _Conv(inputs, channels)
        self.branch7x7dbl_2 = _Conv(channels, channels, (7, 1))
        self.branch7x7dbl_3 = _Conv(channels, channels, (1, 7))
        self.branch7x7dbl_4 = _Conv(channels, channels, (7, 1))
        self.branch7x7dbl_5 = _Conv(channels, 192, (1, 7))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average_pool(x))], 1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192)
        self.branch3x3_2 = _Conv(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = _Conv(192, 192, (3, 3), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([branch3x3, branch7x7, functional.max_pool2d(x, 3, stride=2)], 1)


class _BlockE(nn.Module):
    """Splits 3x3 into 1x3 beside 3x1. The very last block pools by maximum, a slip of 2015 that the FID keeps."""

    def __init__(self, inputs: int, *, max_pool: bool = False) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _Conv(inputs, 320)
        self.branch3x3_1 = _Conv(inputs, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3))
        self.branch3x3_2b = _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Conv(inputs, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average_pool(x)
        singles = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *singles, *doubles, self.branch_pool(pooled)], 1)
