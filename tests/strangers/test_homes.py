"""Users without a home, folders that cannot be written, temporary folders with long names."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.connection import parse_url

from collegium.cli.embedded import private_directory, server_url, socket_path
from collegium.cli.environment import service_env
from collegium.fabric import private_folder
from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.fabric.settings import ServiceSettings, read, setting
from collegium.model import cache_root
from collegium.model.cache_root import cache_file, cache_notice
from collegium.model.manifest import ensure_manifest
from tests.gateway_rig import DEMO


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithPath(ServiceSettings):
    file: Path = setting("a file")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of this test's own; nothing that was chosen before is remembered."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder


def no_entry(self: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.fixture
def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user whom neither HOME nor passwd gives a home."""
    monkeypatch.delenv("HOME", raising=False)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_entry)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))


@pytest.mark.usefixtures("without_home")
def test_a_user_without_a_home_caches_in_a_folder_of_their_own(temporary: Path) -> None:
    folder = temporary / f"collegium-{os.getuid()}"
    manifest = ensure_manifest(DEMO)
    assert manifest.parent == folder / "manifests"
    assert ensure_manifest(DEMO) == manifest  # found again
    assert folder.stat().st_mode & 0o777 == 0o700
    assert f"caches go to {folder}: there is no home; set XDG_CACHE_HOME" in cache_notice()
    env = service_env(1)
    assert (env["HOME"], env["USER"]) == (str(folder), str(os.getuid()))
    assert env["TRITON_CACHE_DIR"].startswith(str(folder))
    with pytest.raises(SettingsError, match="give the whole path"):
        read(_WithPath, ["--file", "~/x"], {})


@pytest.mark.parametrize("home", ["", "relative", "/proc/nowhere", "/dev/null", "/nonexistent"])
def test_a_home_that_cannot_be_written_is_no_obstacle(
    home: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home.startswith("/nonexistent"):
        monkeypatch.setattr(Path, "mkdir", _refuse_outside(temporary, Path.mkdir))
    monkeypatch.setenv("HOME", home)
    assert cache_file("kernels.json").is_relative_to(temporary)
    assert cache_notice().count("\n") == 0 and "caches go to" in cache_notice()


def _refuse_outside(folder: Path, mkdir: Callable[..., None]) -> Callable[..., None]:
    def refusing(self: Path, *args: object, **options: object) -> None:
        if not self.is_relative_to(folder):
            raise PermissionError(30, "Read-only file system")
        mkdir(self, *args, **options)

    return refusing


@pytest.mark.parametrize("xdg", ["/proc/nowhere", "/dev/null/x"])
def test_a_cache_home_that_cannot_be_written_is_no_obstacle(
    xdg: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert ensure_manifest(DEMO).is_relative_to(temporary)
    assert f"{xdg}/collegium cannot be written (" in cache_notice()


def test_where_a_cache_can_be_written_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("kernels.json") == tmp_path / ".cache" / "collegium" / "kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which means nothing
    assert cache_file("kernels.json") == tmp_path / ".cache" / "collegium" / "kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_file("kernels.json") == tmp_path / "x" / "collegium" / "kernels.json"
    assert cache_notice() == ""
    assert not {"HOME", "TRITON_CACHE_DIR"} & (service_env(1).keys() - os.environ.keys())


def test_a_cache_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ensure_manifest(DEMO, out=tmp_path / "m.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    there = cache_file("manifests/m.json")
    there.parent.mkdir(parents=True)
    made.rename(there)
    monkeypatch.setattr(cache_root, "_refusal", lambda folder: "Read-only file system")
    cache_root._choose.cache_clear()
    assert cache_file("manifests/m.json") == there
    assert cache_file("manifests/other.json") != there.with_name("other.json")
    cache_root._choose.cache_clear()


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_folder_that_somebody_else_may_have_laid_out_is_not_used(
    kind: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = temporary / f"collegium-{os.getuid()}"
    if kind == "link":
        (temporary / "elsewhere").mkdir()
        trap.symlink_to(temporary / "elsewhere")
    elif kind == "file":
        trap.write_text("")
    else:
        trap.mkdir()
        trap.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", f"/proc/nowhere-{kind[:4]}")
    file = cache_file("kernels.json")
    assert file.is_relative_to(temporary) and not file.is_relative_to(trap)
    assert cache_file("kernels.json") == file, "one choice per process"


@settings(max_examples=30)
@given(st.integers(1, 250), st.sampled_from(["x", "ä", " ", '"', "%", "#", "?"]))
def test_the_embedded_redis_has_a_socket_below_any_temporary_folder(length: int, character: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent, pytest.MonkeyPatch.context() as patch:
        name = (character * length).encode()[:250].decode(errors="ignore")
        folder = Path(parent) / name
        folder.mkdir()
        patch.setattr(tempfile, "tempdir", str(folder))
        directory = private_directory()
        try:
            path = str(socket_path(directory))
            assert len(os.fsencode(path)) <= 107
            assert path.isascii() and '"' not in path
            assert directory.stat().st_mode & 0o077 == 0
            if len(path) < 90 and character in "x%":
                assert directory.parent in (folder, Path("/tmp"))
            assert parse_url(server_url(directory))["path"] == path
        finally:
            directory.rmdir()
        assert not list(folder.iterdir()), "what did not fit is taken away"


@pytest.mark.parametrize("name", ["/nowhere", "/proc", "/dev/null"])
def test_a_temporary_folder_that_cannot_be_written_is_passed_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", name)
    directory = private_directory()
    assert directory.parent == Path("/tmp")
    directory.rmdir()


def test_where_no_folder_will_do_each_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(private_folder, "_SHORT_ROOTS", (Path("/nowhere"), Path("/proc")))
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(FailedPrecondition, match=r"/nowhere: .*; /proc: .*set REDIS_URL") as caught:
        private_directory()
    assert caught.value.field == "TMPDIR"
