"""Every knob once: names, refusals, and the way to JSON and back."""

import ast
import dataclasses
import inspect
import json
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config as config_module
from pipeline.config import (
    ClusterConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    ProtocolConfig,
    SamplingConfig,
    ScheduleConfig,
    ShowConfig,
    TrainConfig,
    TuneConfig,
    from_flat,
    override,
    to_flat,
)
from pipeline.errors import UserError
from pipeline.presets import PRESETS, preset

MODEST = settings(deadline=None, max_examples=60)
CONFIGS = [
    value for value in vars(config_module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)
]
JOBS = [TrainConfig(), TuneConfig(), EvaluateConfig(pending=True), PrepareConfig(), ShowConfig()]


def leaf_names(config: object) -> list[str]:
    names = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        names += leaf_names(value) if dataclasses.is_dataclass(value) else [entry.name]
    return names


def refusal(cls: type, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        cls(**values)
    return str(caught.value)


def positive_floats(most: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(1e-12, most, allow_nan=False)


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.none() | st.from_regex(r"[a-z0-9][a-z0-9._-]{0,30}", fullmatch=True),
        "experiment": st.text(max_size=10),
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.integers(1, 10**9),
        "schedule": st.sampled_from(["linear", "cosine", "quadratic", "sigmoid"]),
        "beta_start": positive_floats(),
        "allow_signal_at_T": st.booleans(),
        "channel_mult": st.lists(st.integers(1, 8), min_size=1, max_size=6),
        "attention_resolutions": st.lists(st.integers(1, 64), max_size=4),
        "dropout": st.floats(0, 1, exclude_max=True),
        "lr": positive_floats(),
        "eta": st.floats(0, 1),
        "use_gpu": st.booleans(),
        "data": st.text(max_size=20),
    },
)


@pytest.mark.parametrize("config", JOBS, ids=lambda config: type(config).__name__)
def test_no_two_knobs_of_a_job_share_a_name(config):
    names = leaf_names(config)
    assert len(names) == len(set(names))
    assert set(to_flat(config)) == set(names)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_knob_and_group_explains_itself_in_one_line(cls):
    body = ast.parse(inspect.getsource(cls)).body[0].body
    assert inspect.getdoc(cls).splitlines()[0].endswith((".", ". "))
    for knob, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(knob, ast.AnnAssign) and not dataclasses.is_dataclass(typing.get_type_hints(cls)[knob.target.id]):
            assert isinstance(below, ast.Expr), f"{knob.target.id} has no docstring"
            assert isinstance(below.value, ast.Constant)
            text = below.value.value
            assert "\n" not in text
            assert text.endswith(".")


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_configs_are_frozen_and_take_keywords_only(cls):
    assert cls.__dataclass_params__.frozen
    assert all(entry.kw_only for entry in dataclasses.fields(cls))


@MODEST
@given(st.sampled_from(list(PRESETS)), OVERRIDES)
def test_a_config_survives_the_way_to_json_and_back(name, overrides):
    config = override(preset(name), overrides)
    assert from_flat(TrainConfig, json.loads(json.dumps(to_flat(config)))) == config


@MODEST
@given(st.sampled_from(list(PRESETS)), OVERRIDES)
def test_an_override_changes_exactly_what_it_names(name, overrides):
    before, after = to_flat(preset(name)), to_flat(override(preset(name), overrides))
    assert after == before | overrides


@pytest.mark.parametrize("config", JOBS, ids=lambda config: type(config).__name__)
def test_every_job_s_config_survives_the_way_to_json_and_back(config):
    assert override(config, json.loads(json.dumps(to_flat(config)))) == config


def test_an_override_leaves_the_original_alone():
    base = TrainConfig()
    override(base, {"T": 7})
    assert base.diffusion.T == 1000


def test_json_lists_become_tuples_again():
    model = from_flat(TrainConfig, {"channel_mult": [1, 2, 3], "attention_resolutions": []}).model
    assert (model.channel_mult, model.attention_resolutions) == ((1, 2, 3), ())


def test_json_integers_become_floats_again_where_the_knob_is_a_float():
    grad_clip = from_flat(TrainConfig, {"grad_clip": 2}).optimizer.grad_clip
    assert isinstance(grad_clip, float)
    assert grad_clip == 2.0


def test_booleans_and_integers_stay_what_they_are():
    config = from_flat(TrainConfig, {"use_gpu": True, "T": 10})
    assert config.cluster.use_gpu is True
    assert type(config.diffusion.T) is int


def test_an_unknown_knob_offers_the_nearest():
    with pytest.raises(UserError, match=r"^unknown knob 'scheduel'; did you mean 'schedule'\?$"):
        from_flat(TrainConfig, {"scheduel": "cosine"})


def test_a_knob_like_no_other_gets_the_list_of_all():
    with pytest.raises(UserError, match=r"^unknown knob 'zzzz'; known: T, adam_eps, .*, x0_percentile$"):
        from_flat(TrainConfig, {"zzzz": 1})


def test_the_name_of_a_group_is_no_knob():
    with pytest.raises(UserError, match="unknown knob 'optimizer'"):
        from_flat(TrainConfig, {"optimizer": {}})


def test_an_override_is_checked_like_a_new_config():
    with pytest.raises(UserError, match="--lr -1"):
        override(TrainConfig(), {"lr": -1.0})


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"image_size": 0}, "--image-size 0: must be at least 1"),
        (ModelConfig, {"image_channels": 2}, "--image-channels 2: must be 1 (grey) or 3 (RGB)"),
        (ModelConfig, {"dropout": 1.0}, "--dropout 1.0: must be in [0, 1)"),
        (ModelConfig, {"dropout": float("nan")}, "--dropout nan: must be in [0, 1)"),
        (DataConfig, {"batch_size": 0}, "--batch-size 0: must be at least 1"),
        (DataConfig, {"num_streams": 0}, "--num-streams 0: must be at least 1"),
        (DataConfig, {"batch_size": 65}, "--batch-size 65: must be a multiple of --num-streams 16"),
        (OptimizerConfig, {"lr": 0.0}, "--lr 0.0: must be above 0 and finite"),
        (OptimizerConfig, {"lr": float("nan")}, "--lr nan: must be above 0 and finite"),
        (OptimizerConfig, {"lr_warmup_steps": -1}, "--lr-warmup-steps -1: must be at least 0"),
        (OptimizerConfig, {"grad_clip": -1.0}, "--grad-clip -1.0: must be at least 0"),
        (OptimizerConfig, {"ema_decay": 1.0}, "--ema-decay 1.0: must be in [0, 1)"),
        (
            ClusterConfig,
            {"num_workers": 0},
            "--num-workers 0: must be a whole number from 1 on, or MIN:MAX with 1 <= MIN <= MAX, for example 2:8",
        ),
        (ClusterConfig, {"cpus_per_worker": 0}, "--cpus-per-worker 0: must be at least 1"),
        (SamplingConfig, {"sampling_steps": 0}, "--sampling-steps 0: must be at least 1"),
        (SamplingConfig, {"eta": 1.1}, "--eta 1.1: must be in [0, 1]"),
        (SamplingConfig, {"x0_percentile": 0.0}, "--x0-percentile 0.0: must be above 0 and at most 1"),
        (ProtocolConfig, {"features": "vgg"}, "--features vgg: must be efficientnet-lite0, inception or module:URI"),
        (SamplingConfig, {"sample_seed": -1}, "--sample-seed -1: must be at least 0"),
        (ProtocolConfig, {"num_images": 1}, "--num-images 1: must be at least 2"),
        (ProtocolConfig, {"chunk_size": 0}, "--chunk-size 0: must be at least 1"),
        (TrainConfig, {"seed": -1}, "--seed -1: must be in [0, 2**63)"),
        (TrainConfig, {"seed": 2**63}, f"--seed {2**63}: must be in [0, 2**63)"),
        (TrainConfig, {"steps": 0}, "--steps 0: must be at least 1"),
        (TrainConfig, {"log_every": 0}, "--log-every 0: must be at least 1"),
        (TrainConfig, {"checkpoint_every": 0}, "--checkpoint-every 0: must be at least 1"),
        (TrainConfig, {"keep_checkpoints": 0}, "--keep-checkpoints 0: must be at least 1"),
        (TrainConfig, {"grid_images": 0}, "--grid-images 0: must be at least 1"),
        (
            TrainConfig,
            {"cluster": ClusterConfig(num_workers=17)},
            "--num-workers 17: must be at most --num-streams 16",
        ),
        (PrepareConfig, {"images_per_shard": 0}, "--images-per-shard 0: must be at least 1"),
        (PrepareConfig, {"image_channels": 4}, "--image-channels 4: must be 1 (grey) or 3 (RGB)"),
        (EvaluateConfig, {}, "give one of --run, --pending, --checkpoint, --compare and --report"),
        (
            EvaluateConfig,
            {"run": "a", "pending": True},
            "give one of --run, --pending, --checkpoint, --compare and --report",
        ),
        (EvaluateConfig, {"checkpoint": "a"}, "--checkpoint and --reference go together: give both or none"),
        (EvaluateConfig, {"run": "a", "watch": True}, "--watch looks for pending checkpoints; give --pending as well"),
        (EvaluateConfig, {"pending": True, "max_checkpoints": 0}, "--max-checkpoints 0: must be at least 1"),
        (EvaluateConfig, {"pending": True, "max_minutes": 0.0}, "--max-minutes 0.0: must be above 0"),
        (EvaluateConfig, {"pending": True, "interval": 0.0}, "--interval 0.0: must be above 0"),
        (EvaluateConfig, {"pending": True, "champion_margin": 1.0}, "--champion-margin 1.0: must be in [0, 1)"),
        (TuneConfig, {"schedules": ()}, "--schedules (): must be at least one schedule"),
        (
            TuneConfig,
            {"base": TrainConfig(diffusion=ScheduleConfig(T=50))},
            "--T 50: a sweep tries several; give --Ts",
        ),
        (
            TuneConfig,
            {"base": TrainConfig(diffusion=ScheduleConfig(beta_start=0.1))},
            "--beta-start 0.1: a sweep tries several; give --beta-ranges",
        ),
        (TuneConfig, {"Ts": ()}, "--Ts (): must be at least one T"),
        (TuneConfig, {"beta_ranges": ("0.1",)}, "--beta-ranges '0.1' is not START:END; for example 1e-4:0.02"),
        (TuneConfig, {"beta_ranges": ("1:2:3",)}, "--beta-ranges '1:2:3' is not START:END; for example 1e-4:0.02"),
    ],
)
def test_a_refusal_names_the_flag_what_was_given_and_what_is_allowed(cls, values, message):
    assert refusal(cls, **values) == message


@pytest.mark.parametrize("name", ["a", "Run-1_b.2", "0", "x" * 200])
def test_a_name_of_letters_digits_dash_underscore_and_dot_is_accepted(name):
    assert TrainConfig(name=name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\nb", "ä", "x" * 201, "-", "s3://x", "a:b"])
def test_a_name_that_is_no_folder_everywhere_is_refused(name):
    assert refusal(TrainConfig, name=name).startswith(f"--name {name!r}: use letters")


def test_an_evaluation_after_training_uses_the_training_s_sampler_and_workers():
    training = override(TrainConfig(), {"experiment": "x", "eta": 0.5, "num_workers": 4})
    protocol = ProtocolConfig(num_images=7)
    after = EvaluateConfig.after(training, protocol)
    assert (after.experiment, after.sampling, after.cluster) == ("x", training.sampling, training.cluster)
    assert after.protocol == protocol


def test_a_beta_range_is_two_numbers():
    assert TuneConfig.parse_beta_range("1e-4:0.02") == (1e-4, 0.02)


def test_a_seed_at_the_top_of_its_range_is_accepted():
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1


def test_schedule_values_are_left_to_the_schedule_itself():
    assert ScheduleConfig(T=0).T == 0


@pytest.mark.parametrize("knobs", [{"audit_dir": "audit"}, {"audit_dir": "s3://b/audit"}, {"cache_dir": "cache"}])
def test_a_folder_of_the_workers_must_be_absolute(knobs):
    with pytest.raises(UserError, match="must be an absolute path"):
        from_flat(TrainConfig, knobs)
