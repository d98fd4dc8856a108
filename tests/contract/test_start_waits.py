"""How long services wait at their start for those that they cannot do without, and what they say in the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from collegium.model.manifest import ensure_manifest
from tests.oracle import Oracle

ROOT = Path(__file__).parents[2]
WAIT_S = "0.25"  # of the default's 30 s, in which each test would be over as well


@pytest.mark.parametrize("module", ["gateway", "expert_svc"])
def test_a_service_that_finds_no_balancer_ends_after_the_time_that_it_was_given(
    oracle: Oracle, tmp_path: Path, module: str
) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    flags = ["--balancer", unused_address(), "--balancer-wait-s", WAIT_S]
    if module == "gateway":
        flags += ["--model", str(checkpoint)]
    else:
        flags += ["--manifest", str(ensure_manifest(checkpoint, out=tmp_path / "manifest.json"))]
    said = last_words(module, *flags)
    assert "did not answer within 0.25 s" in said
    assert "--balancer-wait-s says how long to wait" in said


def test_a_balancer_that_finds_no_redis_ends_after_the_time_that_it_was_given() -> None:
    said = last_words("balancer_svc", "--redis-wait-s", WAIT_S, REDIS_URL=f"redis://{unused_address()}")
    assert "Redis did not answer within 0.25 s" in said
    assert "--redis-wait-s says how long to wait" in said


def unused_address() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def last_words(module: str, *flags: str, **env: str) -> str:
    """Run a service to its end, which must come with status 1; gives its last line."""
    process = subprocess.run(
        [sys.executable, "-m", module, *flags, "--log-level", "error"],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 1, process.stderr
    return process.stderr.splitlines()[-1]
