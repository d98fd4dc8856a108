"""What is written: to a reader that leaves or does not read, to a terminal of ASCII, to a stream that was closed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from collegium.cli import first_completion
from collegium.cli import target as t
from collegium.cli.child import ChildFailed
from collegium.cli.main import main
from collegium.cli.show import Demand
from collegium.cli.spec import ClusterSpec
from collegium.fabric import streams
from collegium.fabric.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted
from collegium.launch import ROOT
from tests.gateway_rig import DEMO

LIMIT_S = 60.0


@contextmanager
def outliving_pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Put pipes in the place of stdout and stderr, as `up` sees them; gives the ends to read."""
    ends: dict[str, int] = {}
    mine: list[int] = []
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            ends[name], write_end = os.pipe()
            mine.append(write_end)
            patch.setattr(sys, name, open(write_end, "w", encoding="ascii", closefd=False))  # noqa: SIM115
        streams.outlive_readers()
        yield ends
    for descriptor in (*ends.values(), *mine):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_what_nobody_reads_is_lost_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with outliving_pipes(monkeypatch) as pipes:
        sys.stdout.write("first\n")
        assert os.read(pipes["stdout"], 100) == b"first\n"
        for end in pipes.values():
            os.close(end)
        for stream in (sys.stdout, sys.stderr):
            for _ in range(3):
                stream.write("second\n")
                stream.flush()
            stream.buffer.write(b"third\n")
            stream.flush()


def test_a_reader_that_does_not_read_holds_up_no_writer_for_long_and_gets_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "_PATIENCE_S", 0.1)
    with outliving_pipes(monkeypatch) as pipes:
        written = threading.Event()

        def write() -> None:
            for _ in range(200):
                sys.stderr.write("x" * 4000 + "\n")  # more than a pipe holds
            written.set()

        threading.Thread(target=write, daemon=True).start()
        assert written.wait(LIMIT_S), "a supervisor that waits for a reader supervises nothing"
        while len(os.read(pipes["stderr"], 65536)) == 65536:
            pass
        sys.stderr.write("later\n")
        assert os.read(pipes["stderr"], 65536).endswith(b"later\n")


def test_a_stream_that_somebody_made_non_blocking_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with outliving_pipes(monkeypatch) as pipes:
        os.set_blocking(sys.stdout.fileno(), False)
        got = bytearray()

        def read() -> None:
            while len(got) < 300_000:
                got.extend(os.read(pipes["stdout"], 4096))

        reader = threading.Thread(target=read)
        reader.start()
        sys.stdout.write("y" * 300_000)
        sys.stdout.flush()
        reader.join(LIMIT_S)
        assert len(got) == 300_000


def test_a_full_disk_costs_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        streams.outlive_readers()
        sys.stderr.write("lost\n")
        sys.stdout.write("lost\n")
        sys.stdout.flush()


def test_a_closed_stream_is_there_again_and_a_terminal_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    with open(follower, "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", None)
        streams.outlive_readers()
        assert sys.stdout.isatty() and not sys.stderr.isatty()
        sys.stderr.write("lost\n")
        sys.stdout.write("你 é\n")
        assert os.read(leader, 100) == b"? ?\r\n"
        sys.stderr.close()
    os.close(leader)


def collegium(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "collegium", *argv], cwd=ROOT, **options)


def test_a_command_whose_reader_leaves_ends_without_a_word() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = collegium("status", "--help", stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    _, err = process.communicate(timeout=LIMIT_S)
    assert err == b""
    assert process.returncode == 1


def test_a_command_whose_output_finds_no_room_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    silenced: list[bool] = []
    monkeypatch.setattr(streams, "silence", lambda: silenced.append(True))  # else pytest itself would be
    monkeypatch.setattr(sys, "argv", ["collegium", "status", "--help"])
    with monkeypatch.context() as patch, open("/dev/full", "wb", buffering=0) as full:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(full), "utf-8"))
        assert main() == 1
        with contextlib.suppress(OSError):
            sys.stdout.close()
    assert capfd.readouterr().err == "collegium: the output cannot be written: No space left on device\n"
    assert silenced


def test_complaining_to_nobody_changes_no_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.TextIOBase):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError(errno.EPIPE, "gone")

    monkeypatch.setattr(sys, "argv", ["collegium", "generate", "--target", "nowhere"])
    monkeypatch.setattr(sys, "stderr", Gone())
    assert main() == 1


def test_arguments_are_read_as_utf_8_in_any_locale() -> None:
    for text in ("plain", "héllo 你好", "a" * 50):
        in_ascii = text.encode().decode("ascii", "surrogateescape")
        assert t.typed(in_ascii) == t.read_prompt(in_ascii) == text
    assert t.typed("\udcff") == "\udcff"  # bytes that are no UTF-8 are for the gateway to refuse


class FakeCluster:
    """As much of a cluster as a completion needs; members that it names do not answer."""

    targets = ("127.0.0.1:1",)
    members = ()

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def wait_until(self, condition: Any, limit_s: float, what: str = "") -> None:
        if self._error is not None:
            raise self._error
        while not condition():
            pass


DEMAND = Demand(prompt="a", max_tokens=4, temperature=0.0, top_k=0, seed=0)
SPEC = ClusterSpec(model=DEMO, manifest=Path("m.json"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (InvalidArgument("the prompt is too long"), "INVALID_ARGUMENT: the prompt"),
        (ResourceExhausted("full"), "RESOURCE_EXHAUSTED: full"),
        (Cancelled("the gateway went"), "CANCELLED: the gateway went"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "UnicodeEncodeError: "),
        (BrokenPipeError(errno.EPIPE, "gone"), "BrokenPipeError: "),
        (SystemExit(3), "SystemExit: 3"),
        (RuntimeError("two\nlines\n" + "x" * 5000), "RuntimeError: two lines xxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_first_completion_that_fails_in_any_way_is_one_line(
    fault: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(first_completion, "stream_completion", fail)
    lines: list[str] = []
    cluster: Any = FakeCluster()
    assert first_completion.show_completion(cluster, SPEC, DEMAND, lines.append) is False
    (line,) = lines
    assert line.startswith(f"the first completion failed, the cluster serves: {said}")
    assert "\n" not in line and len(line) < 500


def test_what_ends_the_cluster_is_no_failure_of_the_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_completion, "stream_completion", lambda *_, **__: None)
    lines: list[str] = []
    died = ChildFailed("x exited", last_lines=[], has_relayed_lines=True, exit_status=1)
    for error in (died, Cancelled("asked to stop")):
        cluster: Any = FakeCluster(error)
        with pytest.raises(type(error)):
            first_completion.show_completion(cluster, SPEC, DEMAND, lines.append)
    assert not lines
    late: Any = FakeCluster(DeadlineExceeded("the first completion did not come true within 600 s"))
    assert first_completion.show_completion(late, SPEC, DEMAND, lines.append) is False
    assert "within 600 s" in lines[0]
