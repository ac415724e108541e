"""Brings MLflow's two databases to the schema of the installed version."""

import logging

from settings import DATABASES, Settings


def upgrade(settings: Settings) -> list[str]:
    """Upgrades records and users; says of each database what was done. Addresses are on no command line.

    Raises:
        ServiceError: A migration failed.
    """
    # Here, since where packages are missing a line is to say so.
    import mlflow.db
    import mlflow.server.auth.db.cli
    from errors import ServiceError

    logging.disable(logging.INFO)
    migrations = dict(zip(DATABASES, (mlflow.db.upgrade, mlflow.server.auth.db.cli.upgrade), strict=True))
    said = []
    for name, command in migrations.items():
        address, before = settings.database(name), _revision(settings, name)
        words = {"url": address, "revision": "head"} if name == "mlflow_auth" else {"url": address}
        try:
            command.callback(**words)
        except Exception as error:  # MLflow lets through what SQLAlchemy, Alembic and the driver raise
            line = (str(error).splitlines() or [type(error).__name__])[0].replace(address, name)
            raise ServiceError(f"{name} cannot be upgraded, restore the back-up to go back: {line}") from error
        after = _revision(settings, name)
        said.append(f"{name}: {after}, as before" if after == before else f"{name}: {before or 'empty'} -> {after}")
    return said


def _revision(settings: Settings, name: str) -> str | None:
    """Which migration a database is at; None if it is empty."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(settings.database(name))
    table = "alembic_version_auth" if name == "mlflow_auth" else "alembic_version"
    with engine.connect() as connection:
        if not sqlalchemy.inspect(connection).has_table(table):
            return None
        found: str | None = connection.execute(sqlalchemy.text(f"SELECT version_num FROM {table}")).scalar()
    engine.dispose()
    return found
