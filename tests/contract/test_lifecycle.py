"""Processes that live and end as services do: signals, exit statuses, one line where one is enough."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
import asyncio, sys
from collegium.fabric import lifecycle, logs
from collegium.fabric.errors import Cancelled, FailedPrecondition, SettingsError

async def main(stop):
    print("up", flush=True)
"""
TAIL = """
sys.exit(lifecycle.run(main, name="example"))
"""


def start(body: str, **env: str) -> subprocess.Popen[str]:
    """Start a service whose main is this body, and return when it is up."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + indented + TAIL],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; gives status and what was written."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_asks_main_to_end(number: signal.Signals) -> None:
    process = start('await stop.wait()\nprint("handed over", flush=True)')
    process.send_signal(number)
    assert end(process) == (0, "handed over\n", "")


def test_a_supervised_service_ignores_ctrl_c() -> None:
    process = start('await stop.wait()\nprint("handed over", flush=True)', COLLEGIUM_SUPERVISED="1")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "handed over\n", "")


def test_a_second_signal_ends_a_main_that_does_not() -> None:
    process = start('await stop.wait()\nprint("asked", flush=True)\nawait asyncio.sleep(1e6)')
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 1


def test_a_wait_at_the_start_ends_with_the_signal() -> None:
    process = start("await lifecycle.sleep_unless_stopping(1e6)")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "", "")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('raise FailedPrecondition("no such file", field="--manifest", remedy="make it")', 1),
        ('raise SettingsError("--manifest: no such file; make it")', 2),
        ('raise ExceptionGroup("g", [SettingsError("--manifest: no such file; make it")])', 2),
    ],
    ids=["error", "setting", "in a group"],
)
def test_our_errors_are_one_line_and_a_status(body: str, status: int) -> None:
    assert end(start(body)) == (status, "", "example: --manifest: no such file; make it\n")


def test_a_fault_shows_its_traceback() -> None:
    status, _, err = end(start("raise ZeroDivisionError('oh')"))
    assert status == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: oh" in err


def test_garbage_is_looked_for_once_among_what_was_made_since_the_imports() -> None:
    body = """
await stop.wait()
import gc, weakref
class Node: pass
def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)
imported = cycle()
lifecycle.keep_imports()
made = cycle()
print(gc.isenabled(), imported() is None, made() is None, flush=True)
lifecycle.freeze()
print(gc.isenabled(), imported() is None, made() is None, gc.get_freeze_count() > 10_000, flush=True)
"""
    process = start(body)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "False False False\nTrue False True True\n", "")
