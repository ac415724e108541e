"""Creates MLflow's users, with nothing but Python: ``compose.yaml`` runs this file too.

Reads MLFLOW_TRACKING_URI, the administrator's MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and for each user
NAME on the command line the password NAME_PASSWORD (upper case, - as _). A user who exists gets the password anew.
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.request


def ensure_user(server: str, admin: tuple[str, str], name: str, password: str) -> None:
    """Makes a user, or gives an existing one this password.

    Raises:
        urllib.error.HTTPError: MLflow refuses.
    """
    try:
        _call(server, admin, "POST", "create", {"username": name, "password": password})
    except urllib.error.HTTPError as error:
        if "RESOURCE_ALREADY_EXISTS" not in error.read().decode(errors="replace"):
            raise
        # Who changes their own password says the present one again.
        present = {"current_password": admin[1]} if name == admin[0] else {}
        _call(server, admin, "PATCH", "update-password", {"username": name, "password": password, **present})


def _call(server: str, admin: tuple[str, str], method: str, verb: str, body: dict[str, str]) -> None:
    token = base64.b64encode(":".join(admin).encode()).decode()
    request = urllib.request.Request(
        f"{server.rstrip('/')}/api/2.0/mlflow/users/{verb}",
        data=json.dumps(body).encode(),
        method=method,
        headers={"Content-Type": "application/json", "Authorization": f"Basic {token}"},
    )
    with urllib.request.urlopen(request, timeout=30):
        pass


if __name__ == "__main__":
    login = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
    for user in sys.argv[1:]:
        variable = f"{user.upper().replace('-', '_')}_PASSWORD"
        ensure_user(os.environ["MLFLOW_TRACKING_URI"], login, user, os.environ[variable])
