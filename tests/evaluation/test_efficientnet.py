from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_digits

from pipeline.evaluation.efficientnet import SHA256, EfficientNetLite0, normalize, packaged_weights
from pipeline.evaluation.statistics import FeatureStatistics, frechet_distance
from pipeline.storage import read_bytes, sha256_hex


@pytest.fixture(scope="module")
def state_dict() -> Mapping[str, torch.Tensor]:
    return torch.load(packaged_weights(), weights_only=True)


@pytest.fixture(scope="module")
def network(state_dict: Mapping[str, torch.Tensor]) -> EfficientNetLite0:
    return EfficientNetLite0(state_dict)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """400 real images, uint8 [400, 3, 8, 8]."""
    pixels = (load_digits().images[:400] * 255 / 16).round().astype(np.uint8)
    return torch.from_numpy(pixels)[:, None].repeat(1, 3, 1, 1)


def _images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _statistics(network: EfficientNetLite0, images: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(1280)
    for batch in images.split(50):
        statistics.update(network(batch))
    return statistics


def test_the_packaged_weights_are_the_published_ones():
    assert sha256_hex(read_bytes(packaged_weights())) == SHA256


@pytest.mark.parametrize("side", [8, 32, 64])
def test_folded_features_are_those_of_the_package(
    state_dict: Mapping[str, torch.Tensor], network: EfficientNetLite0, side: int
):
    original = EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(state_dict)
    images = _images(4, 3, side, side)
    x = torch.nn.functional.interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = original.eval().extract_features((x - 127) / 128).mean((2, 3))
        features = network(images)
    assert features.shape == (4, 1280)
    assert features.dtype == torch.float32
    assert float((features - expected).abs().max() / expected.abs().max()) < 1e-5


def test_every_batch_norm_is_folded(network: EfficientNetLite0):
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


def test_train_mode_is_never_entered(network: EfficientNetLite0):
    network.train()
    assert not any(module.training for module in network.modules())


def test_weights_of_another_network_are_refused(state_dict: Mapping[str, torch.Tensor]):
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"_conv_stem\.weight\""):
        EfficientNetLite0({key: value for key, value in state_dict.items() if key != "_conv_stem.weight"})


def test_shrinking_averages_instead_of_sampling_points():
    stripes = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    stripes[..., ::2] = 255
    # Away from the border, where the window is cut, stripes of one pixel become an even grey.
    inner = normalize(stripes)[..., 4:-4] * 128 + 127
    torch.testing.assert_close(inner, torch.full_like(inner, 127.5), rtol=0, atol=1.0)


def test_distance_grows_with_noise_on_real_images(network: EfficientNetLite0, digits: torch.Tensor):
    reference = _statistics(network, digits[:200])
    noise = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    distances = [
        frechet_distance(
            reference, _statistics(network, (digits[200:] + strength * noise).clamp(0, 255).to(torch.uint8))
        )
        for strength in (0, 10, 30, 90)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0] > 0
