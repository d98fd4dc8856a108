"""REDIS_URL: whether it can be one, said before anything is started. Nothing here connects."""

from __future__ import annotations

from urllib.parse import urlsplit

from collegium.fabric.errors import SettingsError


def check_redis_url(url: str) -> None:
    """Raise SettingsError, without repeating a password, where an URL cannot be one of a Redis."""
    remedy = "give redis://HOST:PORT/DB, rediss://HOST:PORT/DB or unix:///PATH"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its message may be a piece of the password
        raise SettingsError(
            f"REDIS_URL is malformed: its host and port cannot be told; {remedy}, with %XX for /, @ and : in a password"
        ) from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise SettingsError(f"REDIS_URL is malformed: its scheme is {parts.scheme!r}; {remedy}")
    if parts.scheme == "unix" and not parts.path:
        raise SettingsError(f"REDIS_URL is malformed: it names no socket; {remedy}")
    if parts.scheme != "unix" and (not parts.hostname or port == 0):
        raise SettingsError(f"REDIS_URL is malformed: it names no host or no port; {remedy}")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdigit():
        raise SettingsError(f"REDIS_URL is malformed: the database {database!r} is not a number; {remedy}")
