"""Checks a set-up and says what to mend: Ray, MLflow, storage, the machine."""
