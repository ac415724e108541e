import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from worlds import small_task

from pipeline.config import override
from pipeline.errors import UserError
from pipeline.presets import preset
from pipeline.training.task import TrainingTask, dry_run, plan


def test_a_task_survives_its_way_to_the_workers(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    assert TrainingTask.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("name", "parameters"), [("cifar10", 35_746_307), ("lsun256", 113_673_219), ("celebahq256", 113_673_219)]
)
def test_a_dry_run_of_the_papers_presets_counts_the_papers_parameters(name: str, parameters: int) -> None:
    facts = dry_run(preset(name))
    assert facts.parameters == parameters
    assert facts.state_bytes == parameters * 20
    assert facts.images is None
    assert f"{parameters:,}" in facts.text()


def test_a_dry_run_counts_epochs_and_activations(tmp_path: Path) -> None:
    task = small_task(tmp_path)
    facts = dry_run(task.config)
    assert (facts.images, facts.images_per_epoch, facts.steps_per_epoch) == (1797, 1788, 149)
    assert facts.signal_at_T == pytest.approx(0.00635, abs=1e-5)
    doubled = dry_run(override(task.config, {"batch_size": 24}))
    assert doubled.activation_bytes == pytest.approx(2 * facts.activation_bytes, rel=0.05)


def test_a_data_set_without_labels_is_refused_for_a_model_with_classes_and_taken_for_one_without(
    tmp_path: Path,
) -> None:
    task = small_task(tmp_path)
    path = Path(task.location) / "manifest.json"
    path.write_text(replace(task.manifest, class_names=()).to_json())
    with pytest.raises(UserError, match=r"--num-classes 10: \S+ has no labels; give 0, or prepare it with labels"):
        plan(override(task.config, {"num_classes": 10}))
    assert plan(task.config).config.model.num_classes == 0


def test_a_dry_run_counts_the_class_table_and_plans_a_guided_class_conditional_model(tmp_path: Path) -> None:
    config = small_task(tmp_path).config
    plain, told = dry_run(config), dry_run(override(config, {"num_classes": 10, "prediction": "v", "guidance": 3.0}))
    assert told.parameters == plain.parameters + 11 * 4 * 8
    assert told.activation_bytes >= plain.activation_bytes


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"image_size": 16, "attention_resolutions": [8]}, r"holds 1x8x8 images, the model takes 1x16x16; give"),
        ({"batch_size": 1800, "num_streams": 12}, r"1797 images.*--batch-size 1800"),
        ({"T": 0}, r"T"),
        ({"beta_start": 0.03}, r"beta"),
        ({"sampling_steps": 2000}, r"--sampling-steps 2000: the model has T=1000"),
        ({"data": "nowhere"}, r"nowhere"),
        ({"num_classes": 9}, r"--num-classes 9: \S+ has 10 classes; give 10, or 0"),
        ({"num_classes": 11}, r"--num-classes 11: \S+ has 10 classes; give 10, or 0"),
        ({"guidance": 2.0}, r"--guidance 2: the model has no classes"),
        ({"num_classes": 10, "label_dropout": 0.0, "guidance": 2.0}, r"--guidance 2: .* never trained without labels"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_starts(
    tmp_path: Path, knobs: dict[str, object], message: str
) -> None:
    config = small_task(tmp_path).config
    with pytest.raises(UserError, match=message):
        plan(override(config, dict(knobs)))
