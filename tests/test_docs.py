"""The documentation: commands parse, links lead somewhere, the reference is current, and what it names exists."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import matplotlib
import mlflow.pyfunc
import pytest
from documented import ALL_COMMANDS, PAGES, Command, blocks
from runner import ROOT, load_job

from pipeline.config import SamplingConfig, to_flat
from pipeline.errors import UserError

JOBS = {path.stem for path in ROOT.glob("jobs/*.py")}


def test_the_pages_hold_commands_of_every_job():
    assert {command.job for command in ALL_COMMANDS} >= JOBS
    assert len(ALL_COMMANDS) > 30


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_documented_command_parses(command: Command):
    assert command.job in JOBS
    try:
        load_job(command.job).parse_arguments(command.flags)
    except UserError as error:
        pytest.fail(f"{' '.join(command.words)}: {error}")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower().replace("`", "")
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(found[1]) for found in re.finditer(r"^#+ (.+)$", page.read_text(), flags=re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def test_pictures_are_small_and_shown():
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    pictures = set((ROOT / "docs" / "images").iterdir())
    assert pictures == {path for path in shown if path.parent == ROOT / "docs" / "images"}
    assert max(path.stat().st_size for path in pictures) < 200_000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["README.md"]


def test_the_reference_is_what_the_config_says():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert (ROOT / "docs" / "reference.md").read_text() == made, "run python docs/make_reference.py"


def test_contributing_names_files_and_things_that_are_there():
    """``_MAY_CHANGE`` in `training/task.py`: the file exists below the root or the package, and has the name."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert name in (ROOT / "pipeline" / file).read_text(), f"{name} in {file}"
    for path in re.findall(r"`((?:pipeline|tests|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    config = (ROOT / "pipeline" / "config.py").read_text()
    for field in re.findall(r"`(\w+Config\.schedules?)`", text):
        assert field.partition(".")[0] in config
    assert len(re.findall(r'Literal\["linear", "cosine"', config)) == len(re.findall(r"`\w+Config\.schedules?`", text))


INLINE = [
    (page, words)
    for page in PAGES
    for words in re.findall(r"`python3? (jobs/\w+\.py[^`]*)`", " ".join(page.read_text().split()))
]


@pytest.mark.parametrize(("page", "words"), INLINE, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_a_command_within_a_sentence_parses(page: Path, words: str):
    script, *flags = shlex.split(words.replace("...", ""))
    alone_means_something = {"prepare_data", "train", "tune", "show", "doctor"}
    if flags or Path(script).stem in alone_means_something:
        load_job(Path(script).stem).parse_arguments(flags)
    assert (ROOT / script).is_file()


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {}
    for page in PAGES:
        code = [line for _, line in blocks(page)] + re.findall(r"`([^`\n]+)`", page.read_text())
        for line in code:
            named |= dict.fromkeys(re.findall(r"(?:^|&& )make ([a-z-]+)", line), page.name)
    assert len(named) > 10
    assert {target: page for target, page in named.items() if target not in targets} == {}


def test_every_script_and_folder_of_a_command_exists():
    made_by_the_reader = {"infra/compose/.env"}
    roots = "benchmarks|docs|infra|jobs|pipeline|tests"
    for page in PAGES:
        code = [line for _, line in blocks(page)] + re.findall(r"`([^`\n]+)`", page.read_text())
        for line in code:
            for path in re.findall(rf"(?:^|(?<=\s))((?:{roots})/[\w./-]*\w)(?=\s|$)", line):
                near = [ROOT / path, page.parent / path]
                is_there = path in made_by_the_reader or any(each.exists() for each in near)
                assert is_there, f"{page.name}: {path} of {line!r}"


PYTHON = [
    pytest.param(found[1], id=page.name)
    for page in PAGES
    for found in re.finditer(r"```python\n(.*?)```", page.read_text(), flags=re.S)
]


@pytest.mark.parametrize("code", PYTHON)
def test_python_in_the_pages_compiles_and_calls_what_exists(code: str):
    tree = ast.parse(code)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called == {"mlflow.pyfunc.load_model", "model.predict"}
    assert callable(mlflow.pyfunc.load_model)
    assert callable(mlflow.pyfunc.PyFuncModel.predict)
    knobs = {ast.literal_eval(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key}
    assert knobs <= {"num_images", *to_flat(SamplingConfig())}


def test_the_python_of_the_pages_is_found():
    assert len(PYTHON) == 2


@pytest.mark.skipif(
    f"matplotlib=={matplotlib.__version__}" not in (ROOT / "constraints.txt").read_text().split(),
    reason="drawn by another matplotlib",
)
def test_the_picture_of_the_schedules_is_what_its_command_draws(tmp_path: Path):
    (words,) = re.findall(r"`python jobs/show\.py (--pictures schedules [^`]+)`", (ROOT / "docs/README.md").read_text())
    load_job("show").main([*shlex.split(words), "--out", str(tmp_path)])
    assert (tmp_path / "schedules.png").read_bytes() == (ROOT / "docs/images/schedules.png").read_bytes()
