"""What a distance depends on, and that old results keep their identity."""

from dataclasses import replace

import pytest

from pipeline.config import EvaluateConfig, SamplingConfig
from pipeline.evaluation.protocol import Protocol, differences

PROTOCOL = Protocol(
    metric="fid",
    features="inception",
    features_sha256="ab" * 32,
    resize="bilinear",
    rounding="half up",
    reference_digest="cd" * 32,
    num_images=2000,
    chunk_size=100,
    threads=1,
    device="cpu",
    weights="ema",
    sampler="ddim(eta=0)",
    sampling_steps=50,
    sample_seed=0,
)


def test_a_protocol_without_guidance_has_the_identity_that_it_had_before_guidance_existed() -> None:
    assert PROTOCOL.identity == "ffa985a54e964ff9"
    assert "guidance" not in PROTOCOL.to_record()


def test_guidance_is_part_of_record_and_identity_where_there_is_any() -> None:
    guided = replace(PROTOCOL, guidance=2.0)
    assert guided.to_record() == {**PROTOCOL.to_record(), "guidance": 2.0}
    identities = {replace(PROTOCOL, guidance=guidance).identity for guidance in (0.0, 1.0, 2.0, 2.5)}
    assert len(identities) == 4


def test_what_differs_between_two_protocols_is_named_and_what_is_stored_beside_them_is_not() -> None:
    record = {**PROTOCOL.to_record(), "code": "a", "note": "few images"}
    assert differences(record, {**PROTOCOL.to_record(), "code": "b"}) == []
    other = replace(PROTOCOL, num_images=500, features_sha256="ef" * 32, guidance=2.0).to_record()
    assert differences(record, other) == [
        "features_sha256 is abababababab... and efefefefefef...",
        "num_images is 2000 and 500",
        "guidance is 1.0 and 2.0",
    ]


class Extractor:
    metric, name, sha256, resize, dim = "fid", "inception", "0" * 64, "299", 2048


def record(**knobs: object) -> dict[str, object]:
    config = EvaluateConfig(pending=True, sampling=SamplingConfig(**knobs))  # type: ignore[arg-type]
    return dict(Protocol.of(config, Extractor(), "d" * 64, "ema").to_record())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("knobs", "added"),
    [
        ({}, {"sampler": "ddim(eta=0)"}),
        ({"sampler": "ddpm"}, {"sampler": "ddpm(fixed-small)"}),
        ({"sampler": "dpm-solver++"}, {"sampler": "dpm-solver++(2M)", "timestep_spacing": "logsnr"}),
        ({"sampler": "heun", "timestep_spacing": "quadratic"}, {"sampler": "heun", "timestep_spacing": "quadratic"}),
        ({"sampler": "heun", "timestep_spacing": "uniform"}, {"sampler": "heun"}),
        ({"x0_clipping": "none"}, {"x0_clipping": "none"}),
        ({"x0_clipping": "dynamic", "x0_percentile": 0.99}, {"x0_clipping": "dynamic(0.99)"}),
        ({"x0_percentile": 0.99}, {}),
    ],
)
def test_a_sampler_is_recorded_with_what_it_has_and_defaults_of_younger_knobs_leave_no_trace(
    knobs: dict[str, object], added: dict[str, object]
) -> None:
    assert record(**knobs) == record() | added
