"""Signals that were ignored when a process began: nohup and a script's "&" mean that it goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from collegium.cli.attention import Attention
from collegium.cli.trace import _on_interrupt
from collegium.cli.up import _Interrupts
from collegium.fabric.signals import ENDING, heeded
from collegium.launch import ROOT

LIMIT_S = 60.0
SERVICE = """
import os, signal, sys
for number in {ignored!r}:
    signal.signal(number, signal.SIG_IGN)
from collegium.fabric import lifecycle

async def main(stop):
    print("up", flush=True)
    await stop.wait()
    print("handed over", flush=True)

sys.exit(lifecycle.run(main, name="example"))
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put the handlers back."""
    before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGWINCH)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", ENDING)
def test_up_top_and_trace_leave_an_ignored_signal_ignored_and_heed_the_others(ignored: signal.Signals) -> None:
    def take_over() -> None:
        with Attention() as attention:
            assert signal.getsignal(ignored) is signal.SIG_IGN
            signal.raise_signal(ignored)
            assert not attention.is_over
            signal.raise_signal(others[0])
            assert attention.is_over
        interrupts = _Interrupts()
        signal.raise_signal(ignored)
        assert not interrupts()
        signal.raise_signal(others[0])
        assert interrupts()

    others = [number for number in ENDING if number != ignored]
    signal.signal(ignored, signal.SIG_IGN)
    for number in others:
        signal.signal(number, signal.SIG_DFL)
    assert list(heeded()) == others
    take_over()
    for number in others:
        signal.signal(number, signal.SIG_DFL)
    is_over = _on_interrupt()
    signal.raise_signal(ignored)
    assert not is_over.is_set()
    signal.raise_signal(others[-1])
    assert is_over.is_set()


def start(ignored: list[signal.Signals]) -> subprocess.Popen[str]:
    code = SERVICE.format(ignored=[int(number) for number in ignored])
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_a_service_of_nohup_and_of_a_scripts_background_ends_by_sigterm_alone() -> None:
    process = start([signal.SIGHUP, signal.SIGINT])
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
        process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT_S)
    # A signal that was not ignored would have cancelled main instead of letting it hand over.
    assert (process.returncode, out) == (0, "handed over\n")


def test_a_service_whose_terminal_closes_hands_over() -> None:
    process = start([])
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (0, "handed over\n")
