"""A real Redis-compatible server for tests, on a unix socket in a folder of its own, on a leash."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

from collegium.cli.child import Child, Command
from collegium.cli.embedded import find_server, server_argv, server_url, socket_path


class RedisServer:
    """Start, stop, kill and start again; what it held survives unless wiped."""

    def __init__(self, directory: Path, *, password: str = "") -> None:
        self._directory = directory
        url = server_url(directory)
        self.url = url.replace("unix://", f"unix://:{password}@") if password else url
        argv = (*server_argv(find_server(os.environ), directory), *(("--requirepass", password) if password else ()))
        self._child = Child(Command(name="redis", argv=argv, env=dict(os.environ)), lambda name, line: None)

    def start(self) -> None:
        """Start, and return when it answers."""
        self._child.start()
        deadline_s = time.monotonic() + 10
        while not self._answers():
            assert time.monotonic() < deadline_s, self._child.tail()
            assert self._child.is_running, self._child.tail()
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it; gone on return."""
        self._child.send(signal.SIGKILL)
        assert self._child.wait(5)
        self._child.close()

    def wipe(self) -> None:
        """Forget everything, while it is down."""
        for path in self._directory.rglob("*"):
            if path.is_file() or path.is_socket():
                path.unlink()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(1)
            try:
                client.connect(str(socket_path(self._directory)))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith((b"+PONG", b"-NOAUTH"))
            except OSError:
                return False
