"""Where what can be made again is kept: XDG_CACHE_HOME, else ~/.cache, else a temporary folder of this user's own.

Owns the choice and its reason; says nothing by itself. A user without a home (a container's user id without an entry in
passwd, a home that is read-only or belongs to somebody else) is served all the same.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from pathlib import Path

_NAME = "collegium"


def cache_file(name: str) -> Path:
    """Return the path of a cached file, such as "kernels.json"; its folder may have to be made.

    A file that is there already is used even if its folder cannot be written. If no folder can be written, not even a
    temporary one, writing to the path fails with OSError.
    """
    wanted = _wanted(os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME"))
    if wanted is not None and (wanted / name).is_file():
        return wanted / name
    return _usable()[0] / name


def cache_notice() -> str:
    """Say in one line that caches go to a temporary folder, and why; empty where they do not."""
    return _usable()[1]


def _usable() -> tuple[Path, str]:
    env = os.environ
    return _choose(env.get("XDG_CACHE_HOME", ""), env.get("HOME"), env.get("TMPDIR", ""))


@functools.cache
def _choose(xdg: str, home: str | None, tmpdir: str) -> tuple[Path, str]:
    """Return the folder that can be written and the notice. Cached by what decides it."""
    del tmpdir  # read by tempfile; part of the key
    wanted = _wanted(xdg, home)
    if wanted is None:
        why = "there is no home"
    else:
        refusal = _refusal(wanted)
        if refusal is None:
            return wanted, ""
        why = f"{wanted} cannot be written ({refusal})"
    try:
        folder = _temporary()
    except OSError:
        return wanted or Path(os.devnull) / _NAME, ""
    return folder, f"caches go to {folder}: {why}; set XDG_CACHE_HOME to keep them elsewhere"


def _wanted(xdg: str, home: str | None) -> Path | None:
    if os.path.isabs(xdg):  # a relative one means nothing, as the XDG specification has it
        return Path(xdg) / _NAME
    if home is not None and not os.path.isabs(home):
        return None
    try:
        return Path.home() / ".cache" / _NAME
    except RuntimeError:  # no HOME, and no entry for this user id
        return None


def _refusal(folder: Path) -> str | None:
    """Try to write into a folder, which is made; returns why that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _temporary() -> Path:
    """Make a folder below the temporary one: the same at every start, unless that one is not this user's alone."""
    root = Path(tempfile.gettempdir())
    folder = root / f"{_NAME}-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if is_ours and _refusal(folder) is None:
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{_NAME}-", dir=root))
