"""`collegium up` from the worst shell that there is: everything that a stranger's machine may bring, at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from collegium.client import Client, RetryPolicy
from collegium.launch import ROOT
from tests.faults.test_up import descendants, wait_until_gone
from tests.gateway_rig import DEMO

LIMIT_S = 100.0
NOBODY = "54321"  # a user id without an entry in passwd
# What runs before `up`: signals as nohup and a script's "&" leave them, and no user that this machine knows. Reading
# stays allowed, for the checkout and the interpreter may be in somebody's home.
STARTER = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""
CAPABILITIES = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *CAPABILITIES)


def can_be_nobody() -> bool:
    """Say whether this test may run processes as a user that the machine does not know."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*AS_NOBODY, sys.executable, "-c", ""], capture_output=True).returncode == 0


SCRIPT = "import sys\nfrom collegium.launch import command\nsys.exit(command())\n"


@contextmanager
def running(folder: Path, *args: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run `up` in a folder, with nothing but this environment."""
    script = folder.parent / "collegium"  # as an installation writes it
    script.write_text(SCRIPT)
    user = AS_NOBODY if can_be_nobody() else ()
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, *user, sys.executable, str(script), "up", *args],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    watch = threading.Timer(LIMIT_S, process.kill)
    watch.start()
    try:
        yield process
    finally:
        watch.cancel()
        process.kill()
        process.wait(LIMIT_S)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def hostile_checkpoint(parent: Path) -> Path:
    """Make a downloaded checkpoint with modules beside it that leave a mark where they are run."""
    folder = parent / "modèle"
    (folder / "tokenizers").mkdir(parents=True)
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    for name in ("gateway", "random", "grpc", "typer", "tokenizers/__init__"):
        (folder / f"{name}.py").write_text(f"open({str(parent / 'MARK')!r}, 'a').write({name!r})\n")
    for name in ("valkey-server", "redis-server"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {parent / 'MARK'}\n")
        (folder / name).chmod(0o755)
    for path in (parent, folder):
        path.chmod(0o777)
    return folder


def read_until(stream: object, text: str) -> list[str]:
    lines: list[str] = []
    for line in stream:  # type: ignore[attr-defined]
        lines.append(line)
        if text in line:
            return lines
    pytest.fail(f"it ended without {text!r}: {''.join(lines)}")


def test_it_starts_shows_and_serves_whatever_the_shell_brings(tmp_path: Path) -> None:
    folder = hostile_checkpoint(tmp_path / "downloads")
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    temporary.chmod(0o777)
    proxies = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "grpc", "all", "HTTPS")}
    env = proxies | {
        "PYTHONPATH": f":{ROOT}:.",
        "PATH": f":{os.environ['PATH']}:.",
        "TMPDIR": str(temporary),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "PYTHONWARNINGS": "error",
        "PYTHONINSPECT": "",
        "COLLEGIUM_HEALTH_BIND": "127.0.0.1:1",
        "COLLEGIUM_BIND": "127.0.0.1:1",
    }
    args = ("--grpc-port", "0", "--max-tokens", "5", "--workers", "1", "--prompt", "héllo")
    with running(folder, ".", *args, env=env) as up:
        assert up.stdout is not None and up.stderr is not None
        said = read_until(up.stderr, "until Ctrl-C")
        (target,) = re.findall(r"serving at (\S+) until", said[-1])
        shown = read_until(up.stdout, "gateway-0")
        pids = descendants(up.pid)

        up.stderr.close()  # the reader leaves
        up.stdout.close()
        for number in (signal.SIGHUP, signal.SIGINT):
            up.send_signal(number)
        (gateway,) = re.findall(r"gateway-0 .*? (\d+) +\|? *\|", shown[-1])
        os.kill(int(gateway), signal.SIGKILL)  # which it says, to nobody, and mends
        patient = RetryPolicy(rounds=1000, longest_pause_s=0.2)
        with Client(target, timeout_s=LIMIT_S, retry=patient) as client:
            assert client.complete("The", max_tokens=3).choices[0].text
        pids |= descendants(up.pid)
        up.send_signal(signal.SIGTERM)
        assert up.wait(LIMIT_S) == 0, "the usual end"
    wait_until_gone(pids)
    assert sum("caches go to" in line for line in said) == (1 if can_be_nobody() else 0)
    assert shown[0].startswith("h?llo")
    assert "".join(shown).isascii() and "".join(said).isascii()
    (row,) = [line for line in shown if "worker-0" in line][:1]
    assert all(int(number.replace(",", "")) > 0 for number in re.findall(r"[\d,]{2,}", row.partition("worker-0")[2]))
    assert not (folder.parent / "MARK").exists(), "code of the working directory was run"
