"""The shell that starts `collegium up`: none of its variables breaks a service or has a stranger's code run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource

from collegium.cli.embedded import find_server
from collegium.cli.environment import DECIDED, service_env
from collegium.cli.spec import ClusterSpec, members_of
from collegium.client import AsyncClient, Client
from collegium.fabric import metrics, rpc
from collegium.fabric.otlp_metrics import MetricsPush
from collegium.launch import PACKAGES, ROOT, absolute_entries
from collegium.v1.inference_pb2 import ListModelsRequest
from collegium.v1.inference_pb2_grpc import InferenceStub
from tests.collector import Collector
from tests.deploy.services import ROLES
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig

LAUNCH = (sys.executable, "-P", str(Path(ROOT) / "collegium" / "launch.py"))
# Modules that a stranger's folder may hold: ours, Python's, and what services import.
NAMES = (
    "gateway",
    "expert_svc",
    "collegium",
    "random",
    "json",
    "asyncio",
    "tokenizers/__init__",
    "torch",
    "grpc",
    "jinja2",
)
SPEC = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules all leave a mark where they are run."""
    for name in NAMES:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'MARK')!r}, 'a').write({name!r})\n")
    return tmp_path


def run(argv: tuple[str, ...], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    return subprocess.run(argv, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("given", [":/nowhere:."])
def test_a_service_runs_nothing_of_the_folder_that_it_is_started_in(hostile: Path, given: str) -> None:
    env = service_env(1, os.environ | {"PYTHONPATH": given})
    done = subprocess.run(
        [*LAUNCH, "gateway", "--help"], cwd=hostile, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "usage: gateway" in done.stdout
    assert not (hostile / "MARK").exists()


@pytest.mark.parametrize("given", [":/nowhere:."])
def test_the_command_runs_nothing_of_the_folder_that_it_is_started_in(hostile: Path, given: str) -> None:
    script = hostile.parent / "collegium-script"  # as an installation writes it
    script.write_text("import sys\nfrom collegium.launch import command\nsys.exit(command())\n")
    (hostile / "MARK").unlink(missing_ok=True)
    # Python itself looks for sitecustomize before any code of ours: that one is the user's own affair.
    first = f"{ROOT}{os.pathsep}{given}"
    done = run((sys.executable, str(script), "status", "--help"), hostile, PYTHONPATH=first)
    assert done.returncode == 0, done.stderr
    assert "placement epoch" in done.stdout
    assert not (hostile / "MARK").exists()


def test_python_c_runs_nothing_of_the_folder_either(hostile: Path) -> None:
    (hostile / "collegium.py").unlink()  # which Python itself takes, before any code of ours
    code = "import sys; from collegium.cli.main import main; sys.exit(main())"
    done = run((sys.executable, "-c", code, "status", "--help"), hostile)
    assert done.returncode == 0, done.stderr
    assert not (hostile / "MARK").exists()


def test_a_module_beside_the_script_is_not_run(hostile: Path, tmp_path: Path) -> None:
    (hostile / "script").write_text(
        f"import sys\nsys.path.append({ROOT!r})\nfrom collegium.launch import guard\nguard()\n"
        "import random, gateway, tokenizers\nprint(gateway.__file__)\n"
    )
    for name in ("collegium.py", "json.py", "asyncio.py"):  # what is imported before guard() has run
        (hostile / name).unlink(missing_ok=True)
    done = run((sys.executable, str(hostile / "script")), Path("/"))
    assert done.stdout.strip() == str(Path(ROOT) / "gateway" / "__init__.py"), done.stderr
    assert not (hostile / "MARK").exists()


def test_every_service_is_launched_from_a_safe_path() -> None:
    for member in members_of(SPEC, "redis://h"):
        assert member.command.argv[: len(LAUNCH)] == LAUNCH
        assert member.command.argv[len(LAUNCH)] in PACKAGES
        assert member.command.env["PYTHONSAFEPATH"] == "1"


ENTRIES = st.lists(st.sampled_from(["", ".", "..", "lib", "./a", "/opt/a", "/opt/b c"]), max_size=5)


@given(ENTRIES, st.sampled_from(["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"]))
def test_no_list_of_folders_keeps_an_entry_that_means_the_working_directory(entries: list[str], name: str) -> None:
    env = service_env(1, {name: os.pathsep.join(entries)})
    kept = [entry for entry in entries if entry.startswith("/")]
    assert env.get(name, "") == os.pathsep.join(kept)
    assert (name in env) == bool(kept)


def test_a_server_in_the_working_directory_is_not_taken_for_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for path in ("", ".", ":", "/nowhere:", "./:.."):
        assert tmp_path not in find_server({"PATH": path}).resolve().parents
    assert find_server({"PATH": str(tmp_path)}).parent == tmp_path
    assert absolute_entries(":/a:.") == ["/a"]


BREAKING: Mapping[str, str] = {
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
    "PYTHONINSPECT": "1",
    "PYTHONSTARTUP": "/nowhere",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONDEVMODE": "1",
    "PYTHONVERBOSE": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
    "PYTHONBREAKPOINT": "nothing.there",
    "PYTHONSAFEPATH": "",
    "PYTHONCASEOK": "1",
    "PYTHONEXECUTABLE": "/nowhere",
    "OMP_PROC_BIND": "close",
    "OMP_PLACES": "cores",
    "OMP_THREAD_LIMIT": "1",
    "GOMP_CPU_AFFINITY": "0",
    "KMP_AFFINITY": "compact",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def test_what_breaks_a_service_or_crowds_all_of_them_onto_one_core_is_not_handed_on() -> None:
    env = service_env(3, BREAKING | {"PYTHONFAULTHANDLER": "1", "CUDA_VISIBLE_DEVICES": "1", "HF_HOME": "/hf"})
    ours = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "3"}
    assert {name: env.get(name) for name in BREAKING if name not in ours} == dict.fromkeys(BREAKING.keys() - ours)
    assert ours.items() <= env.items()
    assert (env["PYTHONFAULTHANDLER"], env["CUDA_VISIBLE_DEVICES"], env["HF_HOME"]) == ("1", "1", "/hf")


@pytest.mark.parametrize("role", ROLES)
def test_no_address_and_no_identity_comes_from_the_shell(role: str) -> None:
    settings = [name for name in ROLES[role].fields if name.endswith(("bind", "advertise"))]
    settings += [name for name in ("balancer", "routers", "cluster", "threads") if name in ROLES[role].fields]
    assert settings
    env = service_env(1, {ROLES[role].variable(name): "x" for name in settings})
    assert not [name for name in settings if ROLES[role].variable(name) in env]
    assert {name.upper() for name in settings} <= set(DECIDED)


PROXIES = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "grpc", "all", "HTTP", "HTTPS", "ALL")}


async def test_a_proxy_of_the_shell_stands_before_no_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    async with rig(FakeRouter()) as served:
        # A name, for gRPC's core asks a proxy to resolve it.
        target = f"localhost:{served.address.rpartition(':')[2]}"
        async with AsyncClient(target, timeout_s=20.0) as client, rpc.channel(target) as channel:
            assert (await client.get_model()).name
            assert (await InferenceStub(channel).ListModels(ListModelsRequest(), timeout=20)).models
        with Client(target, timeout_s=20.0) as blocking:
            assert (await asyncio.to_thread(blocking.get_model)).name
        await rpc.wait_until_serving(target)


def test_telemetry_goes_to_its_collector_past_a_proxy(
    collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    seen, address = collector
    endpoint = "http://localhost:" + address.rpartition(":")[2]
    push = MetricsPush(metrics.registry(), endpoint, Resource.create({"service.name": "x"}), 60.0, start_ns=0)
    push.start()
    push.stop()
    assert "x" in seen.metrics
