"""What one check found."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from pipeline.errors import UserError, WorldError, first_line

__all__ = ["Finding", "State", "fail", "guarded", "ok", "redact", "warn"]

State = Literal["ok", "warn", "fail"]

_SECRET_NAME = re.compile(r"KEY|PASSWORD|SECRET|TOKEN")
_SHORTEST_SECRET = 6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's answer."""

    check: str
    state: State
    text: str
    mend: str = ""
    """What to do about it; nothing if all is well."""

    def line(self) -> str:
        """The finding for a person."""
        advice = f" -> {self.mend}" if self.mend else ""
        return f"{self.state:4}  {self.check:<9}  {self.text}{advice}"

    def to_json(self) -> dict[str, str]:
        """The finding for ``--json``."""
        return asdict(self)


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check=check, state="ok", text=text)


def warn(check: str, text: str, mend: str) -> Finding:
    """It works, but not as it should."""
    return Finding(check=check, state="warn", text=text, mend=mend)


def fail(check: str, text: str, mend: str) -> Finding:
    """A job would fail."""
    return Finding(check=check, state="fail", text=text, mend=mend)


def guarded(check: str, mend: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What ``look`` finds; an error of it is a finding as well, since one check must not hide the others."""
    try:
        return look()
    except (UserError, WorldError, OSError) as error:  # these say themselves what to do
        return [fail(check, first_line(error), mend)]
    except Exception as error:
        return [fail(check, f"{type(error).__name__}: {first_line(error)}", mend)]


def redact(text: str) -> str:
    """A text without the value of any environment variable whose name says that it is a secret."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not name.endswith(("_PATH", "_FILE")) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text
