"""The command line: messages of one line, honest exit codes, one JSON object."""

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field

import pytest

from pipeline import cli
from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.presets import PRESETS, preset


@dataclass(frozen=True, kw_only=True)
class Arguments(cli.JobFlags):
    """A job like those in jobs/."""

    config: TrainConfig = field(default_factory=TrainConfig)


def parse(*argv: str) -> Arguments:
    return cli.parse(Arguments, list(argv), program="job.py")


def parse_with_preset(*argv: str) -> TrainConfig:
    return cli.parse_with_preset(Arguments, list(argv), program="job.py").config


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


def run_script(body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs a job whose main function has this body."""
    script = (
        "import os, subprocess, sys\n"
        "from pipeline import cli\n"
        "from pipeline.errors import UserError, WorldError\n"
        f"def main(argv):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        "cli.run_job(main)\n"
    )
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60)


def test_flags_are_the_leaf_names_of_the_knobs():
    config = parse("--T", "10", "--beta-start", "0.001", "--image-size", "16", "--use-gpu").config
    assert (config.diffusion.T, config.diffusion.beta_start, config.model.image_size) == (10, 0.001, 16)
    assert config.cluster.use_gpu


def test_no_flags_give_the_defaults():
    assert parse() == Arguments()


def test_a_knob_of_many_values_takes_them_as_words():
    assert parse("--channel-mult", "1", "2", "2", "--steps", "3").config == TrainConfig(
        steps=3, model=ModelConfig(channel_mult=(1, 2, 2))
    )


def test_underscores_and_dashes_are_the_same():
    assert parse("--batch_size", "32") == parse("--batch-size", "32")


def test_a_given_default_is_used_where_no_flag_is():
    default = Arguments(config=TrainConfig(steps=77))
    parsed = cli.parse(Arguments, ["--T", "9"], program="job.py", default=default)
    assert (parsed.config.steps, parsed.config.diffusion.T) == (77, 9)


def test_help_lists_every_flag_and_ends_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    assert {"--json", "--schedule", "--ema-decay", "--num-workers"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--schedul", "cosine"), ["--schedul", "Perhaps you meant: --schedule "]),
        (("--batch-sise", "3"), ["--batch-sise", "Perhaps you meant: --batch-size "]),
        (("--steps", "many"), ["--steps", "'many'"]),
        (("--schedule", "lin"), ["'lin'", "--schedule", "'linear', 'cosine', 'quadratic', 'sigmoid'"]),
        (("--batch-size", "63"), ["--batch-size 63: must be a multiple of --num-streams 16"]),
        (("--num-workers", "17"), ["--num-workers 17: must be at most --num-streams 16"]),
        (("stray",), ["Unrecognized options: stray"]),
        (("--steps",), ["--steps"]),
    ],
)
def test_a_wrong_command_is_explained_in_one_plain_line(argv, words):
    message = refusal(*argv)
    assert message.endswith(" (job.py --help lists all flags)")
    assert not [word for word in words if word not in message]
    assert not set(message) & set("\n│╭╮╰╯─\x1b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_its_values(name):
    assert parse_with_preset("--preset", name) == preset(name)


@pytest.mark.parametrize("argv", [("--preset=cifar10", "--steps", "5"), ("--steps", "5", "--preset", "cifar10")])
def test_flags_override_the_preset_wherever_they_stand(argv):
    config = parse_with_preset(*argv)
    assert (config.steps, config.preset, config.model.base_channels) == (5, "cifar10", 128)


def test_of_two_presets_the_last_one_counts_as_for_any_flag():
    assert parse_with_preset("--preset", "cifar10", "--preset", "digits") == preset("digits")


@pytest.mark.parametrize(
    ("preset_name", "flag", "expected"),
    [
        ("cifar10", "--random-flip", True),
        ("cifar10", "--no-random-flip", False),
        ("digits", "--random-flip", True),
        ("digits", "--no-random-flip", False),
    ],
)
def test_a_yes_or_no_knob_is_set_either_way_over_any_preset(preset_name, flag, expected):
    assert parse_with_preset("--preset", preset_name, flag).data.random_flip is expected


def test_no_preset_gives_the_defaults():
    assert parse_with_preset() == TrainConfig()


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'nope'.*'digits', 'cifar10', 'lsun256', 'celebahq256'"):
        parse_with_preset("--preset", "nope")


def test_a_job_that_succeeds_prints_its_text_and_ends_with_0():
    done = run_script("return {'answer': 1}, 'all is well'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "all is well\n", "")


def test_a_wrong_command_ends_with_2_and_one_line_without_a_traceback():
    done = run_script("raise UserError('--T 0: must be\\n  at least 1')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: --T 0: must be at least 1\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("WorldError('MLflow does not answer')", "error: MLflow does not answer\n"),
        (
            "FileNotFoundError(2, 'No such file or directory', '/data/x')",
            "error: [Errno 2] No such file or directory: '/data/x'\n",
        ),
    ],
)
def test_a_failure_of_the_world_ends_with_1_and_one_line_without_a_traceback(error, line):
    done = run_script(f"raise {error}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_ctrl_c_ends_with_130_and_without_a_traceback():
    # A shell starts background commands, perhaps these tests, with SIGINT ignored; a terminal's foreground has it.
    foreground = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = run_script(f"{foreground}; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)")
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "error: interrupted\n")


def test_a_stopped_job_leaves_like_ctrl_c():
    done = run_script("import signal; os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(30)", "--json")
    assert done.returncode == 130
    assert json.loads(done.stdout) == {"error": "interrupted", "exit_code": 130}


def test_a_bug_keeps_its_traceback_and_does_not_end_with_0():
    done = run_script("return {}['missing'], ''", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback (most recent call last)" in done.stderr
    assert "KeyError: 'missing'" in done.stderr


def test_a_job_may_name_its_own_exit_code():
    done = run_script("return {'exit_code': 1, 'failed': 3}, '3 of 4 failed'")
    assert (done.returncode, done.stdout) == (1, "3 of 4 failed\n")


NOISY = """
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    sys.stdout.write("unflushed")
    """


def test_json_leaves_one_object_on_stdout_whoever_else_prints():
    done = run_script(NOISY + "return {'answer': [1, 2.5, None]}, 'text'", "--json")
    assert done.returncode == 0
    assert done.stdout == '{"answer": [1, 2.5, null]}\n'
    assert all(word in done.stderr for word in ("python", "descriptor", "child", "unflushed"))


def test_json_tells_of_an_error_in_one_object_too():
    done = run_script(NOISY + "raise UserError('no such run')", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "no such run", "exit_code": 2}
    assert done.stderr.endswith("error: no such run\n")


def test_a_large_result_is_written_whole_into_a_pipe():
    done = run_script("return {'x': 'y' * 300_000}, ''", "--json")
    assert json.loads(done.stdout) == {"x": "y" * 300_000}


def test_log_lines_go_to_stderr():
    done = run_script("import logging; logging.getLogger('job').info('step 1'); return {}, 'done'")
    assert (done.stdout, done.stderr) == ("done\n", "step 1\n")


def test_without_json_the_job_prints_as_it_likes():
    done = run_script(NOISY + "return {}, ''")
    assert done.returncode == 0
    assert set(done.stdout.split()) == {"python", "descriptor", "child", "unflushed"}


def test_a_private_cluster_gets_a_fresh_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    script = "return {name: os.environ[name] for name in ('RAY_AUTH_MODE', 'RAY_AUTH_TOKEN')}, ''"
    first, second = (json.loads(run_script(script, "--json").stdout) for _ in range(2))
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(bytes.fromhex(first["RAY_AUTH_TOKEN"])) == 32
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_an_interrupted_run_says_what_is_saved_and_how_to_go_on():
    body = """
    from pipeline.errors import Interrupted
    raise Interrupted("a-run", None if "--early" in argv else 1500)
    """
    done = run_script(body, "--steps", "3 000")
    assert done.returncode == 130
    first, _, second = done.stderr.strip().partition("\n")
    assert first == "error: interrupted; run a-run is saved up to step 1,500"
    assert second.startswith(f"continue with: {sys.executable} -c ")
    assert second.endswith(" --steps '3 000' --name a-run")
    named = run_script(body, "--name=a-run", "--early", "--json")
    assert json.loads(named.stdout)["continue_with"].endswith(" --name=a-run --early --json")
    assert "has no checkpoint yet" in named.stderr
