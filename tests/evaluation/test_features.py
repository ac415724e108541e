import io
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.evaluation import efficientnet, features, inception
from pipeline.evaluation.features import EXTRACTORS, METRICS, FeatureExtractor, NetworkExtractor, load_extractor
from pipeline.storage import sha256_hex


class _Mean(torch.nn.Module):
    """Stands for a network: the mean of each channel, and what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.tf32: str | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.tf32 = torch.backends.cudnn.conv.fp32_precision
        return images.float().mean((2, 3)) * self.weight


@pytest.fixture
def extractor() -> NetworkExtractor:
    return NetworkExtractor(name="mean", metric="fd_mean", dim=3, sha256="00", resize="none", network=_Mean())


@pytest.fixture(scope="module")
def efficientnet_lite0() -> FeatureExtractor:
    return load_extractor("efficientnet-lite0")


def test_the_metric_is_called_fid_on_inception_features_only():
    assert EXTRACTORS == ("inception", "efficientnet-lite0")
    assert [METRICS[name] for name in EXTRACTORS] == ["fid", "fd_efficientnet_lite0"]


def test_efficientnet_loads_without_any_file(efficientnet_lite0: FeatureExtractor):
    assert efficientnet_lite0.name == "efficientnet-lite0"
    assert efficientnet_lite0.metric == "fd_efficientnet_lite0"
    assert efficientnet_lite0.dim == 1280
    assert efficientnet_lite0.sha256 == efficientnet.SHA256
    assert "64x64" in efficientnet_lite0.resize
    assert efficientnet_lite0.to("cpu") is efficientnet_lite0


def test_features_are_one_float32_row_an_image_without_a_graph(efficientnet_lite0: FeatureExtractor):
    rows = efficientnet_lite0(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert (rows.shape, rows.dtype, rows.requires_grad) == ((2, 1280), torch.float32, False)


def test_grey_is_repeated_to_three_channels(efficientnet_lite0: FeatureExtractor):
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(efficientnet_lite0(grey), efficientnet_lite0(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 4, 8, 8, dtype=torch.uint8)],
    ids=["float", "no batch", "four channels"],
)
def test_images_of_another_type_or_shape_are_refused(extractor: NetworkExtractor, images: torch.Tensor):
    with pytest.raises(ValueError, match=r"give uint8 \[B, 1 or 3, H, W\]"):
        extractor(images)


def test_tf32_is_off_inside_and_as_before_outside(extractor: NetworkExtractor):
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    extractor(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert extractor.network.tf32 == "ieee"
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_a_weights_file_with_the_expected_sha256_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    buffer = io.BytesIO()
    torch.save({"weight": torch.tensor(2.0)}, buffer)
    path = tmp_path / "weights.pth"
    path.write_bytes(buffer.getvalue())
    monkeypatch.setattr(inception, "SHA256", sha256_hex(buffer.getvalue()))
    given = []
    monkeypatch.setattr(inception, "Inception", lambda state_dict: given.append(state_dict) or _Mean())
    loaded = load_extractor("inception", weights=str(path))
    assert given[0]["weight"] == 2
    assert (loaded.name, loaded.metric, loaded.dim) == ("inception", "fid", 2048)
    assert loaded.sha256 == sha256_hex(buffer.getvalue())
    assert "TensorFlow 1" in loaded.resize


def test_the_inception_sha256_is_the_one_that_its_public_file_name_begins():
    assert inception.SHA256.startswith("6726825d")
    assert len(inception.SHA256) == 64


def test_a_wrong_sha256_is_refused_before_anything_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    monkeypatch.setattr(features.torch, "load", lambda *_args, **_kwargs: pytest.fail("the file was parsed"))
    with pytest.raises(UserError) as error:
        load_extractor("inception", weights=str(path))
    line = str(error.value)
    for words in (str(path), sha256_hex(b"anything"), inception.SHA256, "weights-inception-2015-12-05-6726825d.pth"):
        assert words in line
    assert "\n" not in line


def test_inception_without_weights_is_refused_with_what_to_give():
    with pytest.raises(UserError, match=r"need --inception-weights .* pt_inception-2015-12-05-6726825d\.pth"):
        load_extractor("inception")


def test_a_missing_weights_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match=rf"cannot read the weights file {tmp_path}/none\.pth \(FileNotFoundError\)"):
        load_extractor("inception", weights=str(tmp_path / "none.pth"))


class _Flat(torch.nn.Module):
    """A module of 12 features: the means of 2x2 tiles of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


class _Picture(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def _saved(module: torch.nn.Module, path: Path) -> str:
    torch.jit.save(torch.jit.script(module), str(path))
    return sha256_hex(path.read_bytes())


def test_a_torchscript_module_is_an_extractor_named_by_its_file(tmp_path: Path):
    sha256 = _saved(_Flat(), tmp_path / "My Flat-v2.pt")
    extractor = load_extractor(f"module:{tmp_path}/My Flat-v2.pt", sha256=sha256.upper())
    assert (extractor.name, extractor.metric) == ("module:My Flat-v2", "fd_module_my_flat_v2")
    assert (extractor.dim, extractor.sha256) == (12, sha256)
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    features = extractor(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, _Flat()(images.expand(-1, 3, -1, -1)).float())
    assert extractor.to("cpu") is extractor


def test_a_module_with_another_sha256_is_refused_before_anything_parses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "flat.pt"
    actual = _saved(_Flat(), path)
    monkeypatch.setattr(torch.jit, "load", lambda *_args, **_kwargs: pytest.fail("the file was parsed"))
    with pytest.raises(UserError, match=f"has sha256 {actual}, expected {'0' * 64}"):
        load_extractor(f"module:{path}", sha256="0" * 64)
    with pytest.raises(UserError, match="needs --features-sha256: a TorchScript file is a program"):
        load_extractor(f"module:{path}")


def test_a_file_that_gives_no_features_is_refused_with_what_is_wanted(tmp_path: Path):
    path = tmp_path / "picture.pt"
    sha256 = _saved(_Picture(), path)
    with pytest.raises(UserError, match=r"gives torch\.float32 \[2, 3, 32, 32\] for 2 images; a module for"):
        load_extractor(f"module:{path}", sha256=sha256)
    path.write_bytes(b"not a module")
    with pytest.raises(UserError, match="is no TorchScript file"):
        load_extractor(f"module:{path}", sha256=sha256_hex(b"not a module"))


def test_a_sha256_for_an_extractor_that_has_a_published_one_is_refused():
    with pytest.raises(UserError, match="goes with --features module:URI"):
        load_extractor("efficientnet-lite0", sha256="0" * 64)


def test_weights_for_an_extractor_that_brings_its_own_are_refused():
    with pytest.raises(UserError, match="brings its own weights"):
        load_extractor("efficientnet-lite0", weights="weights.pth")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'vgg'; choose one of inception, efficientnet-lite0"):
        load_extractor("vgg")
