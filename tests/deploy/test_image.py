"""The image and the compose file: pinned, without root, and telling services only what they have settings for."""

import re
from typing import Any

import pytest
import yaml

from collegium.fabric import settings
from tests.deploy.helm import CHART, ROOT, VALUES, containers, pods, render
from tests.deploy.services import ROLES

DOCKER = ROOT / "deploy" / "docker"
BY_MODULE = {role.module: name for name, role in ROLES.items()}


def stages() -> dict[str, list[str]]:
    """Give the instructions of each stage of the Dockerfile, whole lines, by the stage's name."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        if match := re.match(r"FROM (\S+)(?: AS (\w+))?", line):
            name = match[2] or "default"
            found[name] = []
        if line:
            found[name].append(line)
    return found


def compose() -> dict[str, Any]:
    """Read the compose file, with what each ${NAME:-default} stands for without an environment."""
    text = (DOCKER / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


def composed() -> list[tuple[str, dict[str, Any]]]:
    return [
        (BY_MODULE[service["command"][3]], service)
        for service in compose()["services"].values()
        if service["command"][:3] == ["python", "-P", "-m"]
    ]


def test_the_base_is_pinned_and_is_what_the_project_runs_on() -> None:
    (base,) = [line for line in stages()[""] if line.startswith("ARG PYTHON_IMAGE=")]
    version = re.fullmatch(r"ARG PYTHON_IMAGE=\S+/python:(\d+\.\d+)\.\d+-slim-\w+", base)
    assert version is not None and version[1] == "3.11"
    assert [lines[0] for name, lines in stages().items() if name in ("build", "cpu")] == [
        "FROM ${PYTHON_IMAGE} AS build",
        "FROM ${PYTHON_IMAGE} AS cpu",
    ]


def test_everything_that_is_installed_is_pinned_by_the_lock() -> None:
    installs = [part for line in stages()["build"] for part in line.split("&&") if "pip install" in part]
    assert len(installs) == 3
    torch, dependencies, project = installs
    assert "grep '^torch==' requirements.lock" in torch
    assert "--constraint requirements.lock" in dependencies
    assert "--no-deps" in project and "--no-build-isolation" in project
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^torch==\S+$", lock, flags=re.MULTILINE)
    assert re.search(r"^setuptools==\S+$", lock, flags=re.MULTILINE)


def test_the_image_that_serves_has_no_compiler_no_root_and_no_cache() -> None:
    assert stages()["default"] == ["FROM cpu"]  # without --target
    for name in ("build", "cpu", "cuda"):
        text = "\n".join(stages()[name])
        assert text.count("apt-get update") == text.count("rm -rf /var/lib/apt/lists/*")
        assert text.count("apt-get install --yes --no-install-recommends") == text.count("apt-get install")
    assert "gcc" not in "\n".join(stages()["cpu"])
    assert "PIP_NO_CACHE_DIR=1" in "\n".join(stages()["build"])
    for name in ("cpu", "cuda"):
        users = [line for line in stages()[name] if line.startswith("USER ")]
        assert users[-1] == "USER 10001:10001"
    assert "HEALTHCHECK NONE" in stages()["cpu"]
    assert 'ENTRYPOINT ["/usr/bin/tini", "--"]' in stages()["cpu"]


def test_an_image_without_the_c_kernels_is_not_built() -> None:
    (build,) = [line for line in stages()["build"] if "collegium.model.native" in line]
    assert "sys.exit(library() is None)" in build
    assert "gcc" in "\n".join(stages()["build"])


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in (line for lines in stages().values() for line in lines if line.startswith("COPY ")):
        words = [word for word in line.split()[1:-1] if not word.startswith("--")]
        if "--from=build" in line:
            continue
        for word in words:
            assert (ROOT / word).exists(), word
            assert word.rstrip("/") in kept, word


def test_the_chart_and_the_image_agree() -> None:
    image = "\n".join(stages()["cpu"])
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert (
        f"--uid {values['podSecurityContext']['runAsUser']} --gid {values['podSecurityContext']['runAsGroup']} "
        in image
    )
    assert f"COPY models/demo-lm/ {values['model']['image']['path']}/" in image
    images = {container["image"] for _, _, spec in pods(render("default")) for container in containers(spec)}
    valkey = compose()["services"]["valkey"]["image"]
    assert images == {valkey, compose()["services"]["worker"]["image"]}


@pytest.mark.parametrize("role", ROLES)
def test_compose_tells_a_service_what_it_has_settings_for(role: str) -> None:
    (service,) = [one for name, one in composed() if name == role]
    env = {name: str(value) for name, value in service["environment"].items()}
    known = {ROLES[role].variable(field) for field in ROLES[role].fields}
    assert env.keys() - known <= {"OMP_NUM_THREADS"}
    options = settings.read(ROLES[role].settings, service["command"][4:], env)
    services = compose()["services"]
    if role != "balancer":
        host, _, port = options.balancer.partition(":")
        assert services[host]["environment"]["COLLEGIUM_BIND"] == f"0.0.0.0:{port}"
    else:
        assert options.redis_url.split("/")[2].split(":")[0] in services
    checks = services[role]["healthcheck"]["test"]
    assert options.health_bind.rpartition(":")[2] in checks[-1]


def test_no_python_of_image_chart_and_compose_imports_from_the_working_directory() -> None:
    assert "PYTHONSAFEPATH=1" in "\n".join(stages()["cpu"])
    assert len(composed()) == len(ROLES)
    for service in compose()["services"].values():
        check = service["healthcheck"].get("test", [])
        for argv in (service["command"], check[1:]):
            assert argv[:1] != ["python"] or argv[1] == "-P", argv
    for name in VALUES:
        for _, _, spec in pods(render(name)):
            for container in containers(spec):
                args = container.get("args", [])
                assert args[:1] != ["python"] or args[1] == "-P", args
    # What people are told to type, in front of which any folder may lie.
    for page in (ROOT / "docs").glob("*.md"):
        assert not re.search(r"python3? -m (gateway|router_svc|expert_svc|balancer_svc)\b", page.read_text()), page


def test_compose_locks_its_containers_up_and_publishes_the_gateway_alone() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert ("ports" in service) == (name == "gateway")
        assert not service["image"].endswith(":latest") and ":" in service["image"]
        assert set(service.get("depends_on", {})) <= set(compose()["services"])
    assert compose()["services"]["gateway"]["ports"] == ["127.0.0.1:50051:50051"]


def test_compose_makes_the_manifest_that_services_read() -> None:
    manifest = compose()["services"]["manifest"]["command"]
    for role, service in composed():
        if role in ("router", "worker"):
            assert service["environment"]["COLLEGIUM_MANIFEST"] == manifest[-1]
        if role in ("router", "gateway"):
            assert service["environment"]["COLLEGIUM_MODEL"] == manifest[2]
        if role != "balancer":
            assert f"../../models/demo-lm:{manifest[2]}:ro" in service["volumes"]
