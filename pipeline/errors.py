"""The two ways a job can end badly. A leaf module: everyone may import it, it imports nobody."""

import re

__all__ = ["UserError", "WorldError", "first_line"]


class UserError(ValueError):
    """Something the caller gave is wrong and the caller can mend it: one line, exit code 2."""


class WorldError(RuntimeError):
    """The input was fine but the world was not (server down, training diverged): one line, exit code 1."""


def first_line(error: BaseException) -> str:
    """An error in one line, without the password of any address in it."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return re.sub(r"//[^/\s@]+@", "//***@", line)
