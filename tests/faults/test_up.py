"""`collegium up` as its user meets it: what it prints, how it ends, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "demo-lm"
COMMAND = [sys.executable, "-c", "import sys; from collegium.cli.main import main; sys.exit(main())", "up"]
LIMIT_S = 100.0


class Up:
    """A running `collegium up`, its lines collected."""

    def __init__(self, *args: str, env: dict[str, str] | None = None) -> None:
        own = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            cwd=ROOT,
            env=own | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, text: str) -> None:
        """Return when a line with this text came on stderr; fail when the process ended without it."""
        with self._news:
            assert self._news.wait_for(lambda: any(text in line for line in self.err), LIMIT_S), self.everything()

    def end(self) -> int:
        """Wait for the end; gives the exit status."""
        status = self.process.wait(LIMIT_S)
        for reader in self._readers:
            reader.join(LIMIT_S)
        return status

    def everything(self) -> str:
        return "".join([*self.out, *self.err])

    def _read(self, stream: object, lines: list[str]) -> None:
        with stream:  # type: ignore[attr-defined]
            for line in stream:  # type: ignore[attr-defined]
                with self._news:
                    lines.append(line)
                    self._news.notify_all()


@contextmanager
def running(*args: str, env: dict[str, str] | None = None) -> Iterator[Up]:
    up = Up(*args, env=env)
    try:
        yield up
    finally:
        if up.process.poll() is None:
            up.process.kill()
        up.end()


def descendants(pid: int) -> set[int]:
    """List the live processes below one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = read_stat(int(entry.name))
            if fields and fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def read_stat(pid: int) -> list[str]:
    """Give state, parent and so on of a process; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_past_its_leash(pid: int) -> bool:
    """Whether a process on a leash has become what it was started for."""
    try:
        return b"leash.py" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: set[int]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while any((read_stat(pid) or "Z")[0] not in "ZX" for pid in pids):
        assert time.monotonic() < deadline_s, f"still there: {pids}"
        time.sleep(0.02)


def test_once_streams_a_completion_shows_the_tables_and_leaves_nothing() -> None:
    with running(str(DEMO), "--once", "--grpc-port", "0", "--max-tokens", "12", "--dtype", "float32") as up:
        up.wait_for("the cluster is SERVING")
        pids = descendants(up.process.pid)
        assert up.end() == 0, up.everything()
    assert len(pids) >= 6
    wait_until_gone(pids)
    out = "".join(up.out)
    assert out.startswith("This package contains a library")
    for word in ("12 tokens", "tokens/s", "worker-0", "worker-1", "router-0", "gateway-0", "balancer"):
        assert word in out
    assert not any(line.startswith(("up |", "router-0 |")) for line in up.out), "logs belong on stderr"


def test_killing_up_leaves_no_process() -> None:
    with running(str(DEMO), "--grpc-port", "0", "--max-tokens", "0", "--workers", "1") as up:
        up.wait_for("until Ctrl-C")
        pids = descendants(up.process.pid)
        assert len(pids) >= 5
        up.process.kill()
        wait_until_gone(pids)


def test_killing_up_while_it_starts_leaves_no_process() -> None:
    with running(str(DEMO), "--grpc-port", "0", "--workers", "1") as up:
        up.wait_for("starting")
        deadline_s = time.monotonic() + LIMIT_S
        while len(pids := {pid for pid in descendants(up.process.pid) if is_past_its_leash(pid)}) < 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        up.process.kill()
        wait_until_gone(pids)


def test_an_interrupt_while_it_starts_ends_everything_with_status_130() -> None:
    with running(str(DEMO), "--grpc-port", "0", "--workers", "1") as up:
        up.wait_for("balancer SERVING")
        pids = descendants(up.process.pid)
        up.process.send_signal(signal.SIGINT)
        assert up.end() == 130, up.everything()
    wait_until_gone(pids)
    assert "up | stopping\n" in up.err
    assert up.err[-1] == "collegium: interrupted\n"


def test_a_port_in_use_is_named_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running(str(DEMO), "--grpc-port", str(port)) as up:
            assert up.end() == 1
        assert f"--grpc-port: 127.0.0.1:{port} is in use; choose another port" in up.everything()


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        ([str(DEMO)], {"REDIS_URL": "http://h"}, "REDIS_URL is malformed"),
        (["/nowhere"], {}, "MODEL_DIR=/nowhere is not a folder"),
        ([str(DEMO), "--workers", "0"], {}, "--workers=0 cannot be used: give at least 1"),
        ([str(DEMO), "--dtype", "int4"], {}, "--dtype='int4' cannot be used: give float32, bfloat16 or auto"),
        ([str(DEMO), "--threads", "all"], {}, "--threads='all' cannot be used: give auto"),
        ([str(DEMO), "--api-keys", "/nowhere"], {}, "--api-keys=/nowhere cannot be read"),
        ([str(DEMO), "--tls-cert", "/nowhere", "--tls-key", "/nowhere"], {}, "--tls-cert=/nowhere cannot be read"),
        ([str(DEMO), "--prompt", ""], {}, "--prompt='' cannot be used"),
        ([str(DEMO), "--max-tokens", "-1"], {}, "--max-tokens"),
    ],
    ids=["REDIS_URL", "folder", "workers", "dtype", "threads", "keys", "certificate", "prompt", "length"],
)
def test_what_cannot_be_used_ends_it_with_status_2(args: list[str], env: dict[str, str], message: str) -> None:
    with running(*args, env=env) as up:
        assert up.end() == 2
    assert message in up.everything()


def test_a_setting_that_only_a_service_reads_ends_it_with_status_2_and_is_told_once() -> None:
    env = {"COLLEGIUM_MAX_REQUESTS": "0"}
    with running(str(DEMO), "--grpc-port", "0", "--workers", "1", env=env) as up:
        assert up.end() == 2
    assert sum("COLLEGIUM_MAX_REQUESTS='0' cannot be used" in line for line in up.err) == 1
    assert "up | gateway-0 exited with status 2\n" in up.err
