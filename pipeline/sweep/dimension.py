"""Which values a knob may take: ``KNOB=choice(a,b)``, ``uniform(a,b)``, ``loguniform(a,b)`` or ``randint(a,b)``."""

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError

__all__ = ["Choice", "Dimension", "Range", "knob_types", "parse_search"]

_SPEC = re.compile(r"(\w+)=(choice|uniform|loguniform|randint)\((.*)\)")
_BRACKETS_ASIDE = re.compile(r",(?![^\[]*\])")
_DIGITS = 4
"""Significant digits of a drawn number: the name of a trial then tells it whole."""


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def draw(self, generator: np.random.Generator) -> Any:
        """One of them, each as likely."""
        return self.values[int(generator.integers(len(self.values)))]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number from ``low`` to ``high``, both included."""

    low: float
    high: float
    is_log: bool = False
    """Whether the logarithm is uniform."""
    is_int: bool = False

    def draw(self, generator: np.random.Generator) -> float:
        """A uniform draw."""
        if self.is_int:
            return int(generator.integers(int(self.low), int(self.high) + 1))
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        value = low + (high - low) * float(generator.random())
        return self.rounded(math.exp(value) if self.is_log else value)

    def rounded(self, value: float) -> float:
        """The value with few digits, inside the range."""
        if self.is_int:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


Dimension = Choice | Range


def parse_search(flag: str, text: str, knobs: dict[str, Any]) -> tuple[str, Dimension]:
    """Reads one ``KNOB=SPEC``.

    Args:
        flag: The flag's name in messages.
        text: The words.
        knobs: Types of the knobs that may be given, by name.

    Raises:
        UserError: It is none, the knob is unknown or takes no such values.
    """
    match = _SPEC.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UserError(f"{flag} {text!r}: must be KNOB=choice(A,B), uniform(A,B), loguniform(A,B) or randint(A,B)")
    knob, kind, inside = match.groups()
    if knob not in knobs:
        raise UserError(f"{flag} {text!r}: {knob!r} is not one of {', '.join(sorted(knobs))}")
    words = [word for word in _BRACKETS_ASIDE.split(inside) if word]
    try:
        if kind == "choice":
            return knob, _choice([_value(word, knobs[knob]) for word in words])
        return knob, _range(kind, words, knobs[knob])
    except ValueError as error:
        raise UserError(f"{flag} {text!r}: {error}") from None


def _choice(values: list[Any]) -> Choice:
    if not values:
        raise ValueError("give at least one value")
    return Choice(tuple(dict.fromkeys(values)))


def _range(kind: str, words: list[str], hint: Any) -> Range:
    wanted = int if kind == "randint" else float
    if wanted not in _options(hint):
        raise ValueError(f"{kind} gives {'whole' if wanted is int else 'real'} numbers, which this knob does not take")
    try:
        low, high = (wanted(word) for word in words)
    except ValueError:
        raise ValueError(f"{kind} takes two {'whole ' if wanted is int else ''}numbers") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("the first number must be below the second")
    if kind == "loguniform" and low <= 0:
        raise ValueError("a logarithm needs numbers above 0")
    return Range(low=low, high=high, is_log=kind == "loguniform", is_int=kind == "randint")


def knob_types(config: type[Any]) -> dict[str, Any]:
    """The type of every knob of a config class, by leaf name."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        hint = hints[entry.name]
        found |= knob_types(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {entry.name: hint}
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _value(word: str, hint: Any) -> Any:
    """A value of a knob from its text, by the knob's type."""
    reasons = []
    for option in _options(hint):
        try:
            return _of_type(word, option)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"{word!r} is {' and '.join(reasons)}")


def _of_type(word: str, option: Any) -> Any:
    if typing.get_origin(option) is typing.Literal:
        if word in typing.get_args(option):
            return word
        raise ValueError(f"none of {', '.join(typing.get_args(option))}")
    if typing.get_origin(option) is tuple:
        values = json.loads(word) if word.startswith("[") else None
        if isinstance(values, list):
            return tuple(values)
        raise ValueError("no list like [1,2]")
    if option is types.NoneType or option is bool:
        known = {"none": None} if option is types.NoneType else {"true": True, "false": False}
        if word.lower() in known:
            return known[word.lower()]
        raise ValueError(f"not {' or '.join(known)}")
    if option is int or option is float:
        try:
            return option(word)
        except ValueError:
            raise ValueError("no whole number" if option is int else "no number") from None
    return word
