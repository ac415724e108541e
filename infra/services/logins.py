"""MLflow's users as PostgreSQL has them: what cannot be asked of a server that knows other passwords."""

from settings import LOGINS, Settings


def set_passwords(settings: Settings) -> None:
    """Gives the users that exist the passwords of ``secrets.json``. MLflow must not run: it remembers old ones.

    Raises:
        ServiceError: PostgreSQL refuses.
    """
    # Here, since where packages are missing a line is to say so.
    import psycopg2
    from errors import ServiceError
    from werkzeug.security import generate_password_hash

    port, password = settings.ports.postgres, settings.secrets["postgres_password"]
    try:
        connection = psycopg2.connect(
            host="127.0.0.1", port=port, user="mlflow", password=password, dbname="mlflow_auth"
        )
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('users')")
            if cursor.fetchone() == (None,):
                return  # MLflow makes its tables, and the administrator, when it first starts
            for user, name in LOGINS.items():
                hashed = generate_password_hash(settings.secrets[f"mlflow_{user}_password"])
                cursor.execute("UPDATE users SET password_hash = %s WHERE username = %s", (hashed, name))
    except psycopg2.Error as error:
        raise ServiceError(f"MLflow's passwords cannot be set: {str(error).splitlines()[0]}") from error
    connection.close()
