"""The two ways a job can end badly. A leaf module: everyone may import it, it imports nobody."""


class UserError(ValueError):
    """Something the caller gave is wrong and the caller can mend it: one line, exit code 2."""


class WorldError(RuntimeError):
    """The input was fine but the world was not (server down, training diverged): one line, exit code 1."""
