"""How a command about the services ends badly."""


class ServiceError(RuntimeError):
    """One line that says what is wrong and what to do."""
