"""Files that hold secrets: how they are read, and who else can.

Owns the reading of what editors leave in a text file (a byte order mark, other line ends) and the look at its
permissions. Knows nothing of what the secrets are for.
"""

from __future__ import annotations

import stat
from pathlib import Path

from collegium.fabric import logs
from collegium.fabric.errors import SettingsError

_ENCODINGS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_MAX_BYTES = 2**20

_log = logs.get("secrets")


def read_text_file(path: Path, setting: str) -> str:
    """Read a text of at most 1 MiB in UTF-8, or in UTF-16 with its mark; a mark is no part of the text.

    Raises SettingsError, which names the setting and the file and repeats nothing of its content.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{setting}={path} cannot be read: {error.strerror or error}") from error
    if len(packed) > _MAX_BYTES:
        raise SettingsError(f"{setting}={path} cannot be used: it has more than {_MAX_BYTES} bytes")
    encoding = next((name for mark, name in _ENCODINGS if packed.startswith(mark)), "utf-8")
    try:
        # Files that were joined have marks within.
        return packed.decode(encoding).replace("\ufeff", "")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is no {encoding.upper()}"
        raise SettingsError(f"{setting}={path} cannot be read: {why}; save it as UTF-8") from None


def warn_if_open(path: Path, setting: str) -> None:
    """Log a warning if others than the owner can write a secret's file, or others than its group can read it."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever reads it says so
    shown = f"{stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.warning(
            "a secret's file can be CHANGED by other users, who can so put in their own; run chmod 600 on it",
            setting=setting,
            file=str(path),
            mode=shown,
        )
    elif mode & stat.S_IROTH:
        _log.warning(
            "a secret's file can be read by every user; run chmod 600 on it",
            setting=setting,
            file=str(path),
            mode=shown,
        )
