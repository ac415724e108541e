"""A model folder that is measured without MLflow: what is wrong with it is said before Ray starts, by its own name."""

from pathlib import Path

import pytest
from publishing import prepare_digits, write_model

from pipeline.config import EvaluateConfig, SamplingConfig
from pipeline.errors import WorldError
from pipeline.evaluation.folder import evaluate_folder


@pytest.mark.parametrize("file", ["ema.safetensors", "meta.json"])
def test_a_damaged_model_is_named_by_the_place_that_was_given(tmp_path: Path, file: str):
    folder = tmp_path / "model"
    write_model(folder, name="drawn", step=7, seed=0, location=prepare_digits(), noise=0.1)
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    config = EvaluateConfig(checkpoint=str(folder), reference="digits", sampling=SamplingConfig(sampling_steps=4))
    with pytest.raises(WorldError, match=rf"^{folder}/{file} is (missing or )?damaged"):
        evaluate_folder(config)
