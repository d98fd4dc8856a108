"""The file of API keys: one a line, # comments. Who may call with them is the gateway's."""

from __future__ import annotations

from pathlib import Path

from collegium.fabric.errors import SettingsError
from collegium.fabric.secret_files import read_text_file


def read_keys(path: Path) -> list[str]:
    """Read a file of keys; SettingsError if it cannot be read, holds none, or one that no caller can send."""
    keys: list[str] = []
    for number, line in enumerate(read_text_file(path, "--api-keys").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not (key.isascii() and key.isprintable()):
            raise SettingsError(
                f"--api-keys={path} cannot be used: the key in line {number} has a character that is no printable "
                "ASCII, which gRPC metadata cannot carry; choose another key"
            )
        keys.append(key)
    if not keys:
        raise SettingsError(f"--api-keys={path} holds no key; write one a line, or leave the setting out")
    return keys
