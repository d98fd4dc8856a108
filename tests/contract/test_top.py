"""`collegium top` against a real gateway: one frame, JSON, and live in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.fake_router import FakeRouter
from tests.gateway_rig import Rig, gather, ids_request, rig

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "collegium", "top", "--interval", "0.3")


@asynccontextmanager
async def under_load(served: Rig) -> AsyncIterator[None]:
    """Have requests run all the while."""

    async def ask() -> None:
        while True:
            await gather(served.stub.Generate(ids_request(1, 2, 3, max_tokens=20)))

    asking = asyncio.create_task(ask())
    yield
    assert not asking.done()
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def run(*argv: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_one_frame_and_objects_tell_rates_while_requests_run() -> None:
    async with rig(FakeRouter()) as served, under_load(served):
        target = ("--target", served.address)
        once, plain, objects = await asyncio.gather(
            run(*target, "--once"), run(*target), run(*target, "--json", "--iterations", "2")
        )
    assert [(status, err) for status, _, err in (once, plain, objects)] == [(0, "")] * 3
    for frame in (once[1], plain[1]):
        assert "\x1b" not in frame
        assert frame.startswith(f"collegium top  {served.address}  fake-lm (qwen3_moe, float32)")
        assert "2 services" in frame
        assert all(len(line) <= 120 for line in frame.splitlines())
        tokens = next(line.split() for line in frame.splitlines() if line.startswith("tokens/s"))
        assert tokens[tokens.index("out") + 1] not in ("0", "-")
    found = [json.loads(line) for line in objects[1].splitlines()]
    assert len(found) == 2
    for one in found:
        assert one["error"] is None
        assert one["totals"]["tokens_out_per_s"] > 0
        assert one["gateways"][0]["address"] == served.address
        assert one["gateways"][0]["requests_per_s"] >= 0
        assert [row["state"] for row in one["routers"]] == ["SERVING"]
    assert found[0]["unix_s"] < found[1]["unix_s"]


async def test_without_a_gateway_it_ends_as_status_does() -> None:
    status, out, err = await run("--target", "127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.startswith("collegium: UNAVAILABLE")


class Terminal:
    """The command in a terminal of its own, and what it has written there."""

    def __init__(self, *argv: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self._theirs = theirs
        self.before = termios.tcgetattr(theirs)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*COMMAND, *argv],
            **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
            cwd=ROOT,
            env=env | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    async def until(self, wanted: str) -> None:
        """Wait until this is on the screen, or the process has ended."""
        while wanted not in self.text and self.process.poll() is None:  # noqa: ASYNC110 - a thread reads it
            await asyncio.sleep(0.01)
        assert wanted in self.text, self.text[-2000:]

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    async def end(self) -> int:
        """Wait for the end; gives the exit status."""
        return await asyncio.to_thread(self.process.wait)

    @property
    def mode(self) -> list[object]:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._theirs)
        self._reader.join()
        os.close(self._ours)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # all who wrote are gone
            while text := os.read(self._ours, 65536):
                self.text += text.decode(errors="replace")


@contextlib.contextmanager
def terminal(*argv: str) -> Iterator[Terminal]:
    made = Terminal(*argv)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("way", ["q", "interrupt"])
async def test_it_is_live_in_a_terminal_and_leaves_it_as_it_was(way: str) -> None:
    async with rig(FakeRouter()) as served, under_load(served):
        with terminal("--target", served.address) as screen:
            await screen.until("SERVING")
            await screen.until("requests/s ")
            assert screen.mode != screen.before
            if way == "q":
                screen.press(b"q")
            else:
                screen.process.send_signal(signal.SIGINT)
            assert await screen.end() == 0
            await screen.until("\x1b[?1049l")
            assert screen.text.endswith("\x1b[?1049l")
            assert screen.mode == screen.before


async def test_a_gateway_that_goes_away_is_told_and_asked_until_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        served = await first.enter_async_context(rig(FakeRouter()))
        screen = stack.enter_context(terminal("--target", served.address))
        await screen.until("SERVING")
        await first.aclose()
        await screen.until(f"! no answer from {served.address} for ")
        await stack.enter_async_context(rig(FakeRouter(), bind=served.address))
        await screen.until("the gateway answers again after")
        screen.press(b"q")
        assert await screen.end() == 0
