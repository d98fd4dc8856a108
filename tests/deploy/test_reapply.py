"""`helm upgrade` with the same values changes nothing: neither what is rendered, nor what the API server makes of it.

Acts the API server out, as far as the chart's kinds need it: what it drops, what it fills in, how it writes quantities;
and the comparison that kubectl and Helm make before they patch, in which some lists go by a key and others as a whole.
"""

import copy
import hashlib
import re
from typing import Any

import pytest

from tests.deploy.helm import CHART, VALUES, Object, find, render_values, values_of

# Lists that are compared entry by entry, and the key of an entry. All others are compared as a whole, and there what
# the API server fills in makes a difference.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "topologySpreadConstraints": "topologyKey",
}
PORT_KEYS = {"Service": "port", "Pod": "containerPort", "Deployment": "containerPort", "StatefulSet": "containerPort"}
VARIANTS: list[Object] = [
    {},
    *(values_of(name) for name in VALUES if name != "default"),
    {"valkey": {"persistence": {"enabled": True, "storageClassName": "fast"}, "auth": {"existingSecret": "word"}}},
    {
        "gateway": {"replicas": 1, "autoscaling": {"enabled": False}},
        "router": {"replicas": 1},
        "worker": {"replicas": 1},
    },
    {"model": {"name": "m"}, "test": {"target": "gateway.example:443"}},
    {"networkPolicy": {"clients": [{"podSelector": {}}], "metricsFrom": [], "dnsTo": [{"namespaceSelector": {}}]}},
    {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
    {"model": {"source": "objectStore", "objectStore": {"remote": "s:m"}}, "tracing": {"endpoint": "http://c:4317"}},
    {
        "metrics": {
            "podMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboards": {"enabled": True},
        }
    },
]
every_variant = pytest.mark.parametrize("values", VARIANTS, ids=[f"variant-{i}" for i in range(len(VARIANTS))])
SUFFIX = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def stored(one: Object) -> Object:
    """Return an object as the API server keeps it."""
    kept = dropped_empty(copy.deepcopy(one))
    fill_ports(kept)
    if kept["kind"] == "StatefulSet":
        for claim in kept["spec"].get("volumeClaimTemplates", []):
            claim |= {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "status": {"phase": "Pending"}}
            claim["spec"].setdefault("volumeMode", "Filesystem")
    return canonical(kept)


def dropped_empty(value: Any, key: str = "") -> Any:
    """Leave out what has no value of its own: null, empty lists and empty texts (not in maps of the user's)."""
    if isinstance(value, dict):
        is_free = key in ("data", "labels", "annotations", "matchLabels", "nodeSelector")
        return {
            name: dropped_empty(item, name)
            for name, item in value.items()
            if is_free or not (item is None or item == [] or item == "")
        }
    return [dropped_empty(item) for item in value] if isinstance(value, list) else value


def fill_ports(value: Any) -> None:
    """Fill in TCP, wherever a port may have a protocol."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "ports" and isinstance(item, list):
                for port in item:
                    port.setdefault("protocol", "TCP")
            fill_ports(item)
    elif isinstance(value, list):
        for item in value:
            fill_ports(item)


def canonical(value: Any, key: str = "") -> Any:
    """Write quantities as the API server does."""
    if isinstance(value, dict):
        return {
            name: quantity(item) if key in ("requests", "limits") or name == "sizeLimit" else canonical(item, name)
            for name, item in value.items()
        }
    return [canonical(item) for item in value] if isinstance(value, list) else value


def quantity(written: Any) -> str:
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(written))
    assert match is not None, written
    number, suffix = float(match[1]), match[2]
    families = ["Ki", "Mi", "Gi", "Ti"] if suffix.endswith("i") else ["m", "", "k", "M", "G"]
    size = number * SUFFIX[suffix]
    for family in reversed(families):
        if (size / SUFFIX[family]).is_integer():
            return f"{size / SUFFIX[family]:.0f}{family}"
    return f"{size:g}"


def differences(wanted: Any, live: Any, kind: str, path: str = "") -> list[str]:
    """List what a patch from the live object to the wanted one would set."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        found = [f"{path}.{key}: {item!r}" for key, item in wanted.items() if key not in live]
        for key in wanted.keys() & live.keys():
            found += differences(wanted[key], live[key], kind, f"{path}.{key}")
        return found
    if isinstance(wanted, list) and isinstance(live, list):
        name = path.rpartition(".")[2]
        key = PORT_KEYS.get(kind) if name == "ports" else KEYS.get(name)
        if key is not None:
            by_key = {item[key]: item for item in live}
            pairs = [(item, by_key.get(item[key], {})) for item in wanted]
            return [one for item, other in pairs for one in differences(item, other, kind, f"{path}[{item[key]}]")]
        if name == "volumeClaimTemplates":  # the status is the server's own, which kubectl leaves out
            live = [{key: item for key, item in one.items() if key != "status"} for one in live]
    # Helm's YAML has some numbers as texts where Kubernetes takes either; a quantity is a text once it is stored.
    same = str(wanted) == str(live) if not isinstance(wanted, (dict, list)) else wanted == live
    return [] if same else [f"{path}: {wanted!r} instead of {live!r}"]


@every_variant
def test_applying_the_same_again_patches_nothing(values: Object) -> None:
    found = [
        f"{one['kind']} {one['metadata']['name']}{line}"
        for one in render_values(values)
        for line in differences(one, stored(one), one["kind"])
    ]
    assert not found


@every_variant
def test_an_upgrade_renders_what_the_installation_did(values: Object) -> None:
    first, again = (render_values(values) for _ in range(2))
    assert first == again


def test_nothing_in_the_templates_is_drawn_or_looked_up() -> None:
    unstable = re.compile(
        r"\b(rand\w*|uuidv4|now|ago|date\w*|lookup|gen(CA|PrivateKey|SelfSigned\w*|SignedCert\w*)|htpasswd|bcrypt|"
        r"encryptAES|env|expandenv|getHostByName|Release\.(Revision|IsInstall|IsUpgrade))\b"
    )
    for path in CHART.rglob("*"):
        if path.suffix in (".yaml", ".tpl", ".txt") and "templates" in path.parts:
            for action in re.findall(r"\{\{.*?\}\}", path.read_text(), flags=re.DOTALL):
                code = re.sub(r"/\*.*?\*/|\"[^\"]*\"", "", action, flags=re.DOTALL)
                assert not unstable.search(code), f"{path.name}: {action}"


def test_a_new_version_of_the_chart_restarts_no_valkey() -> None:
    # Labels name the chart's version and change with it: the sum that restarts Valkey is of its file's text alone.
    objects = render_values({})
    text = find(objects, "ConfigMap", "valkey")["data"]["valkey.conf"]
    template = find(objects, "StatefulSet", "valkey")["spec"]["template"]
    assert template["metadata"]["annotations"]["checksum/config"] == hashlib.sha256(text.rstrip().encode()).hexdigest()


BROKEN: list[tuple[Object, str]] = [
    ({"kind": "NetworkPolicy", "spec": {"ingress": []}}, ".spec.ingress: []"),
    ({"kind": "NetworkPolicy", "spec": {"egress": [{"ports": [{"port": 53}]}]}}, ".spec.egress"),
    ({"kind": "Pod", "spec": {"containers": [{"name": "a", "env": [{"name": "B", "value": ""}]}]}}, "[a].env[B].value"),
    ({"kind": "Pod", "spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1000m"}}}]}}, "'1000m'"),
    ({"kind": "StatefulSet", "spec": {"volumeClaimTemplates": [{"spec": {}}]}}, ".spec.volumeClaimTemplates"),
    ({"kind": "Service", "spec": {"loadBalancerClass": None}}, ".spec.loadBalancerClass: None"),
]


@pytest.mark.parametrize(("one", "found"), BROKEN, ids=[found for _, found in BROKEN])
def test_the_comparison_can_fail(one: Object, found: str) -> None:
    (line,) = differences(one, stored(one), one["kind"])
    assert found in line
