"""A link that takes its time: a relay that hands on every byte a fixed time after it came, in a process of its own.

Bandwidth is not limited; what one read brings is sent on as one. For benchmarks on one machine that must show what
distance costs.

    python -m benchmarks.delay TARGET_PORT DELAY_MS     prints the port that it listens on, ends with its stdin
"""

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
_READ_BYTES = 1 << 20


class DelayRelay:
    """The relay's process; a context manager. Connect to `port` to reach `target_port` later."""

    def __init__(self, target_port: int, delay_s: float):
        """Start it; the target need not listen yet. `delay_s` is added each way."""
        argv = [sys.executable, "-m", "benchmarks.delay", str(target_port), str(1e3 * delay_s)]
        self._process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> "DelayRelay":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(5)


def free_port() -> int:
    """Find a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _pump(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Hand on what comes, each piece `delay_s` after it came; ends both ways with the first end."""
    waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def write() -> None:
        with contextlib.suppress(OSError):
            while piece := waiting.get():
                due_s, data = piece
                time.sleep(max(0.0, due_s - time.monotonic()))
                if not data:
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=write, daemon=True).start()
    data = b"."
    while data:
        try:
            data = source.recv(_READ_BYTES)
        except OSError:
            data = b""
        waiting.put((time.monotonic() + delay_s, data))


def main() -> None:
    """Relay until stdin ends."""
    target_port, delay_s = int(sys.argv[1]), float(sys.argv[2]) / 1e3
    listener = socket.create_server((HOST, 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), listener.shutdown(socket.SHUT_RDWR)), daemon=True).start()
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection((HOST, target_port))
        except OSError:
            near.close()
            continue
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, target, delay_s), daemon=True).start()


if __name__ == "__main__":
    main()
