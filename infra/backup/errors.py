"""How a back-up ends badly."""


class BackupError(RuntimeError):
    """One line that says what is wrong and what to do."""
