"""The two ways a job can end badly. A leaf module: everyone may import it, it imports nobody."""

import re

__all__ = ["Interrupted", "UserError", "WorldError", "first_line"]


class UserError(ValueError):
    """Something the caller gave is wrong and the caller can mend it: one line, exit code 2."""


class WorldError(RuntimeError):
    """The input was fine but the world was not (server down, training diverged): one line, exit code 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended a run that the same command continues by its name: exit code 130."""

    def __init__(self, run: str, saved_step: int | None) -> None:
        """Says what is left of the run.

        Args:
            run: Its name.
            saved_step: Step of the last checkpoint in storage, None if there is none.
        """
        super().__init__(
            f"interrupted; run {run} is saved up to step {saved_step:,}"
            if saved_step is not None
            else f"interrupted; run {run} has no checkpoint yet"
        )
        self.run = run


def first_line(error: BaseException) -> str:
    """An error in one line, without the password of any address in it."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return re.sub(r"//[^/\s@]+@", "//***@", line)
