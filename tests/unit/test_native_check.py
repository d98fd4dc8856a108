"""A short run of what `make native-check` does at length: the C library under sanitizers, fed with hostile frames."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc with its sanitizers")
def test_hostile_frames_find_no_fault_in_the_native_ends(tmp_path: Path) -> None:
    command = ["make", "-s", "-C", str(ROOT / "tests" / "native"), f"OUT={tmp_path}", "CC=gcc", "short"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "none failed" in result.stdout
