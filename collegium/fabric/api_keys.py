"""The file of API keys: one a line, # comments. Who may call with them is the gateway's."""

from __future__ import annotations

from pathlib import Path

from collegium.fabric.errors import SettingsError


def read_keys(path: Path) -> list[str]:
    """Read a file of keys; SettingsError where it cannot be read or holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-keys={path} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise SettingsError(f"--api-keys={path} holds no key; write one a line, or leave the setting out")
    return keys
