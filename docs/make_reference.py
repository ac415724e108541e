"""Writes docs/reference.md, every flag of every job, from the config itself: ``python docs/make_reference.py``."""

import ast
import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Switch, to_flat
from pipeline.presets import PRESETS, preset

DOCS = Path(__file__).resolve().parent
JOBS = ("prepare_data", "train", "tune", "evaluate", "show", "convert", "doctor")

_HEAD = """# Every flag

Made by `python docs/make_reference.py` from [`pipeline/config.py`](../pipeline/config.py); do not edit. A flag has the
same name everywhere: on the command line, as MLflow param, as key in `meta.json`. Flags of a group that several jobs
share are listed once. `--help` of a job shows the same, with the values of `--preset` filled in.

Lists take their values one after the other (`--channel-mult 1 2 2`). Of a flag that is on or off both forms are shown;
where only one is, it is off unless given.

"""


def reference() -> str:
    """The content of docs/reference.md."""
    jobs = {name: _arguments(name) for name in JOBS}
    users: dict[type, list[str]] = {}
    for name, arguments in jobs.items():
        for group in _groups(arguments):
            users.setdefault(group, []).append(name)
    parts = [_HEAD, "| job | what it does | groups of flags beside its own |\n|---|---|---|\n"]
    for name, arguments in jobs.items():
        links = ", ".join(f"[{_title(group)}](#{_anchor(group)})" for group in _groups(arguments)) or "none"
        parts.append(f"| [`{name}.py`](#jobs{name}py) | {_first_line(arguments)} | {links} |\n")
    for name, arguments in jobs.items():
        parts.append(f"\n## `jobs/{name}.py`\n\n{_first_line(arguments)}\n\n{_table(_own_fields(arguments))}")
    for group, names in users.items():
        where = ", ".join(f"`{name}.py`" for name in names)
        parts.append(f"\n## {_title(group)}\n\n{_first_line(group)} Of {where}.\n\n{_table(_fields(group))}")
    return "".join([*parts, _presets()])


def _arguments(name: str) -> type:
    spec = importlib.util.spec_from_file_location(f"reference_of_{name}", DOCS.parent / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    arguments: type = module.Arguments
    return arguments


Field = tuple[dataclasses.Field[Any], Any, str]
"""A field, its type, and its docstring."""


def _fields(cls: type) -> Iterator[Field]:
    """The flags of a dataclass itself, without those of its groups."""
    hints, words = typing.get_type_hints(cls), _docstrings(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield field, hints[field.name], words[field.name]


def _members(cls: type) -> list[type]:
    hints = typing.get_type_hints(cls)
    return [hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])]


def _own_fields(arguments: type) -> Iterator[Field]:
    """The flags of a job that belong to no shared group: its switches and those of the config that it is about."""
    yield from _fields(arguments)
    for member in _members(arguments):
        if _is_own(member, arguments):
            yield from _fields(member)


def _groups(arguments: type) -> list[type]:
    found: list[type] = []
    waiting = _members(arguments)
    while waiting:
        cls = waiting.pop(0)
        if not _is_own(cls, arguments):
            found.append(cls)
        waiting += _members(cls)
    return found


def _is_own(cls: type, arguments: type) -> bool:
    """Whether it is the one config that the job is called after."""
    hints = typing.get_type_hints(arguments)
    return hints.get("config") is cls


def _docstrings(cls: type) -> dict[str, str]:
    """The strings below the fields, of base classes as well."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[-1]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _table(fields: Iterator[Field]) -> str:
    rows = [
        f"| {_flag(field, hint)} | {_values(hint)} | {_default(field)} | {_escaped(words)} |"
        for field, hint, words in fields
    ]
    return "\n".join(["| flag | values | default | |", "|---|---|---|---|", *rows, ""])


def _flag(field: dataclasses.Field[Any], hint: Any) -> str:
    name = field.name.replace("_", "-")
    return f"`--{name}`, `--no-{name}`" if hint is bool and not _is_switch(field) else f"`--{name}`"


def _is_switch(field: dataclasses.Field[Any]) -> bool:
    return field.type is Switch or "Switch" in str(field.type) or "FlagCreatePairsOff" in str(field.type)


def _values(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " ".join(f"`{option}`" for option in options)
    if typing.get_origin(hint) is tuple:
        several = _values(options[0])
        return f"list of {several}" if several.startswith("`") else f"{several}s".replace("texts", "list of texts")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_values(option) for option in options if option is not types.NoneType))
    return {bool: "on, off", int: "whole number", float: "number", str: "text"}[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`" if value else "none"
    return f"`{value}`"


def _presets() -> str:
    default = to_flat(preset("digits"))
    knobs = [knob for knob in default if any(knob in values for values in PRESETS.values())]
    rows = [
        f"| `--{knob.replace('_', '-')}` | "
        + " | ".join(f"`{_words(to_flat(preset(name))[knob])}`" for name in PRESETS)
        + " |"
        for knob in knobs
    ]
    head = f"| flag | {' | '.join(f'`{name}`' for name in PRESETS)} |\n|{'---|' * (len(PRESETS) + 1)}"
    text = "What `--preset` of `train.py` and `tune.py` sets; any other flag overrides it."
    return "\n".join(["", "## Presets", "", text, "", head, *rows, ""])


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _title(cls: type) -> str:
    return f"{cls.__name__.removesuffix('Config')} flags"


def _anchor(cls: type) -> str:
    return _title(cls).lower().replace(" ", "-")


def _escaped(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    (DOCS / "reference.md").write_text(reference())
