"""Storage as jobs use it, and how far a server's clock is from this machine's."""

import secrets
import time

from pipeline import storage
from pipeline.doctor.finding import Finding, fail, ok, warn

__all__ = ["clock", "storage_serves"]

_LATE_SECONDS = 5.0
_TOO_LATE_SECONDS = 60.0
"""Drivers trust the clocks of other machines to a minute; S3 refuses requests that are a quarter of an hour off."""


def storage_serves() -> list[Finding]:
    """``$DDPM_HOME`` takes a file, shows it, gives it back and lets it go."""
    location = storage.join(storage.home(), "doctor", secrets.token_hex(8))
    content = secrets.token_bytes(1024)
    started = time.monotonic()
    storage.write_bytes(location, content)
    try:
        if storage.read_bytes(location) != content:
            return [fail("storage", f"{storage.home()} gives back other bytes than it took", "look at the server")]
        if location not in storage.list_files(location.rpartition("/")[0]):
            return [fail("storage", f"{storage.home()} does not list what it took", "allow s3:ListBucket")]
    finally:
        storage.remove(location)
    if storage.exists(location):
        return [fail("storage", f"{storage.home()} keeps what was deleted", "allow s3:DeleteObject")]
    seconds = time.monotonic() - started
    findings = [ok("storage", f"{storage.home()}: write, read, list and delete in {seconds:.2f} s")]
    if storage.is_remote(storage.home()):
        findings.append(clock("S3", storage.clock_offset_seconds(storage.home())))
    return findings


def clock(server: str, offset_seconds: float) -> Finding:
    """How far a server's clock is from this machine's; the header tells whole seconds."""
    text = f"{server}'s clock is {abs(offset_seconds):.0f} s {'ahead of' if offset_seconds > 0 else 'behind'} this one"
    mend = "synchronise both machines (chrony, systemd-timesyncd)"
    if abs(offset_seconds) > _TOO_LATE_SECONDS:
        return fail("clock", text, mend)
    return (
        warn("clock", text, mend)
        if abs(offset_seconds) > _LATE_SECONDS
        else ok("clock", f"{server} and this machine agree")
    )
