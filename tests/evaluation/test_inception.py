from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.evaluation.inception import Inception, resize_like_tensorflow1


def _randomize(state_dict: dict[str, torch.Tensor]) -> None:
    """Random weights that keep activations near one through all layers, so that no error hides in zeros."""
    generator = torch.Generator().manual_seed(1)
    for key, value in state_dict.items():
        if key.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif key.endswith(("running_mean", "bn.bias")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif value.ndim == 4:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)


@pytest.fixture(scope="module")
def oracle(torch_fidelity: Any) -> Iterator[Any]:
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class RandomInception(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, _nothing: object) -> None:
            _randomize(self.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_args, **_kwargs: {})
        yield RandomInception("random", ["2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def network(oracle: Any) -> Inception:
    return Inception(oracle.state_dict())


def _images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_features_are_those_of_torch_fidelity_with_the_same_weights(oracle: Any, network: Inception):
    images = _images(3, 3, 32, 32)
    expected = oracle(images)[0]
    with torch.no_grad():
        features = network(images)
    assert features.shape == (3, 2048)
    assert features.dtype == torch.float32
    # The images differ in their features, so the comparison is not one of constants.
    assert _relative_error(expected[0], expected[1]) > 0.01
    assert _relative_error(features, expected) < 1e-5


def test_features_of_images_that_are_not_square_and_must_shrink_are_those_of_torch_fidelity(
    oracle: Any, network: Inception
):
    images = _images(1, 3, 310, 57)
    with torch.no_grad():
        assert _relative_error(network(images), oracle(images)[0]) < 1e-5


def test_logits_are_those_of_torch_fidelity_without_the_bias(oracle: Any, network: Inception):
    images = _images(3, 3, 32, 32)
    with torch.no_grad():
        logits = network.logits(network(images))
    assert logits.shape == (3, 1008)
    assert _relative_error(logits, oracle(images)[1]) < 1e-5


def test_a_state_dict_without_classifier_gives_features_but_no_logits(oracle: Any):
    state_dict = {key: value for key, value in oracle.state_dict().items() if not key.startswith("fc.")}
    with pytest.raises(ValueError, match="no classifier"):
        Inception(state_dict).logits(torch.zeros(1, 2048))


def test_the_state_dict_has_the_566_keys_of_the_public_file(oracle: Any):
    state_dict = oracle.state_dict()
    assert len(state_dict) == 566
    assert sum(value.numel() for value in state_dict.values()) == 23_885_486


def test_the_state_dict_of_the_caller_is_not_changed(oracle: Any):
    state_dict = {key: value.clone() for key, value in oracle.state_dict().items()}
    network = Inception(state_dict)
    assert all(torch.equal(value, state_dict[key]) for key, value in oracle.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_train_mode_is_never_entered(network: Inception):
    network.train()
    assert not any(module.training for module in network.modules())


def test_a_file_without_step_counters_is_accepted(oracle: Any):
    state_dict = {key: value for key, value in oracle.state_dict().items() if "num_batches_tracked" not in key}
    assert len(state_dict) == 472
    Inception(state_dict)


@pytest.mark.parametrize("key", ["Mixed_6b.branch7x7_2.conv.weight", "Mixed_7c.branch_pool.bn.running_var"])
def test_a_missing_key_is_refused(oracle: Any, key: str):
    state_dict = {name: value for name, value in oracle.state_dict().items() if name != key}
    with pytest.raises(ValueError, match=f"1 keys are missing, such as '{key}'"):
        Inception(state_dict)


def test_an_unknown_key_is_refused(oracle: Any):
    with pytest.raises(ValueError, match=r"1 keys are unknown, such as 'AuxLogits\.fc\.weight'"):
        Inception({**oracle.state_dict(), "AuxLogits.fc.weight": torch.zeros(1)})


def test_a_weight_of_another_shape_is_refused(oracle: Any):
    with pytest.raises(ValueError, match=r"1 keys are of another shape, such as 'Conv2d_1a_3x3\.conv\.weight'"):
        Inception({**oracle.state_dict(), "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)})


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 32), (64, 48), (299, 299), (320, 500)])
def test_resize_is_that_of_tensorflow_1(torch_fidelity: Any, height: int, width: int):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = _images(2, 3, height, width).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_like_tensorflow1(images, 299), expected, rtol=0, atol=1e-4)


def test_resize_puts_source_pixels_at_whole_multiples_and_repeats_the_last():
    line = torch.tensor([[10.0, 20.0]]).view(1, 1, 1, 2)
    resized = resize_like_tensorflow1(line, 4)
    assert resized[0, 0, 0].tolist() == [10.0, 15.0, 20.0, 20.0]
