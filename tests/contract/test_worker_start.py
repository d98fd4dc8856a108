"""A worker that cannot work with the memory that it is given says so at its start, with the number that it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from collegium.fabric.byte_size import MemoryBudget
from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.fabric.settings import read
from collegium.model.manifest import ensure_manifest, load_manifest
from expert_svc.memory import make_buffer
from expert_svc.settings import Settings
from tests.oracle import Oracle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def manifest(oracle: Oracle, tmp_path: Path) -> Path:
    return ensure_manifest(oracle.checkpoint("mixtral"), out=tmp_path / "manifest.json")


def number_in(message: str) -> MemoryBudget:
    """The budget that a refusal asks for."""
    named = re.search(r"give at least (\S+) \(\d+\.\d MiB\)", message)
    assert named is not None, message
    return MemoryBudget.parse(named[1])


def test_a_worker_ends_with_one_line_that_names_the_least_expert_memory(manifest: Path) -> None:
    flags = ("--manifest", str(manifest), "--balancer", "127.0.0.1:1", "--bind", "127.0.0.1:0")
    process = subprocess.run(
        [sys.executable, "-m", "expert_svc", *flags, "--expert-memory", "4KiB", "--log-level", "error"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "--expert-memory 4KiB is less than two slots take" in line
    buffer = make_buffer(
        load_manifest(manifest), torch.float32, expert_memory=number_in(line), host_memory=MemoryBudget()
    )
    assert buffer.budget_bytes == 2 * buffer.slot_bytes
    buffer.close()


def test_an_arena_without_room_for_one_expert_is_refused_with_the_number_that_has(manifest: Path) -> None:
    def make(host_memory: MemoryBudget) -> None:
        memory = MemoryBudget(share=0.5)
        make_buffer(load_manifest(manifest), torch.float32, expert_memory=memory, host_memory=host_memory).close()

    with pytest.raises(FailedPrecondition, match="--host-memory 4KiB") as refusal:
        make(MemoryBudget(size=4096))
    assert refusal.value.field == "--host-memory"
    make(number_in(str(refusal.value)))


@pytest.mark.parametrize("value", ["0%", "120%", "half", "0"])
def test_a_budget_that_cannot_be_read_is_a_setting_that_names_itself(value: str) -> None:
    with pytest.raises(SettingsError, match="--expert-memory"):
        read(Settings, ["--manifest", "m.json", "--balancer", "b:1", "--expert-memory", value], {})
