"""A folder of this process's own for a unix socket, where nobody but this user can reach it.

Owns where such folders lie, how they are named, and the removal of those that killed processes left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

_LONGEST_PATH = 100  # the kernel takes 107 bytes, and a server may put a number behind the name while it starts
_SHORT_ROOTS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


class NoFolderError(OSError):
    """There is no folder for a socket; the text says what was tried."""


def private_folder(prefix: str, socket_name: str) -> Path:
    """Make a folder (mode 0700) in which a socket of that name fits, and remove orphans of the same prefix.

    It lies in the temporary folder, unless that one's name is longer than a socket's may be, or cannot be written.
    Raises NoFolderError.
    """
    tried: list[str] = []
    for root in _roots():
        try:
            _remove_orphans(root, prefix, socket_name)
            made = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=root))
        except OSError as error:
            tried.append(f"{root}: {error.strerror}")
            continue
        if _fits(made / socket_name):
            return made
        made.rmdir()
        tried.append(f"{root}: a socket's path holds at most {_LONGEST_PATH} plain characters")
    raise NoFolderError("; ".join(tried))


def _roots() -> list[Path]:
    with contextlib.suppress(OSError):  # it finds none that can be written
        return list(dict.fromkeys([Path(tempfile.gettempdir()), *_SHORT_ROOTS]))
    return list(_SHORT_ROOTS)


def _fits(address: Path) -> bool:
    path = str(address)
    return len(os.fsencode(path)) <= _LONGEST_PATH and path.isascii() and path.isprintable() and '"' not in path


def _remove_orphans(root: Path, prefix: str, socket_name: str) -> None:
    for old in root.glob(f"{prefix}*-*"):
        owner = old.name.removeprefix(prefix).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and not _is_alive(old / socket_name):
            shutil.rmtree(old, ignore_errors=True)


def _is_alive(address: Path) -> bool:
    # A process id means nothing across containers that share a folder; an answering socket does.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(address))
        except OSError:
            return False
        return True
