"""What is in the pods: services are told what they have settings for, ports are binds, and everything is locked up."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from collegium.fabric import settings
from tests.deploy.helm import VALUES, Object, containers, find, of_kind, pods, render, render_values
from tests.deploy.services import ROLES, Role

every_values_file = pytest.mark.parametrize("name", VALUES)
# Variables that are no settings, and who reads them.
OTHERS = {
    "POD_IP",  # Kubernetes, in other variables
    "HOME",  # Triton
    "XDG_CACHE_HOME",  # collegium.model
    "OMP_NUM_THREADS",  # OpenMP in torch
    "VALKEY_PASSWORD",  # Kubernetes, in REDIS_URL
    "GRPC_TRACE",  # extraEnv of everything.yaml
}
FROM_PODS = {"status.podIP": "10.0.0.7", "spec.nodeName": "node-3"}


def services(objects: list[Object]) -> Iterator[tuple[Role, str, Object, Object]]:
    """Give (role, its name, its container, its pod's spec) for every service that is rendered."""
    for _, labels, spec in pods(objects):
        component = labels["app.kubernetes.io/component"]
        if component in ROLES:
            (container,) = spec["containers"]
            yield ROLES[component], component, container, spec


def environment_of(container: Object) -> dict[str, str]:
    """Read a container's environment as a kubelet would hand it out."""
    env: dict[str, str] = {}
    for one in container["env"]:
        source = one.get("valueFrom", {})
        assert one["name"] not in env, f"{one['name']} is given twice"
        if "fieldRef" in source:
            value = FROM_PODS[source["fieldRef"]["fieldPath"]]
        elif "resourceFieldRef" in source:
            assert source["resourceFieldRef"]["containerName"] == container["name"]
            assert source["resourceFieldRef"]["resource"] == "requests.cpu"
            cpu = str(container["resources"].get("requests", {}).get("cpu", "0"))
            value = str(-(-int(cpu[:-1]) // 1000)) if cpu.endswith("m") else cpu
        elif "secretKeyRef" in source:
            value = "redis://secret:6379" if one["name"] == "REDIS_URL" else "secret"
        else:
            value = one["value"]
        assert isinstance(value, str)
        env[one["name"]] = re.sub(r"\$\((\w+)\)", lambda match: env[match[1]], value)
    return env


def read(role: Role, container: Object) -> Any:
    """Read a service's settings from its container as the service itself does."""
    return settings.read(role.settings, container["args"][4:], environment_of(container))


@every_values_file
def test_every_role_is_there_and_runs_its_module(name: str) -> None:
    found = {component: container for _, component, container, _ in services(render(name))}
    assert found.keys() == ROLES.keys()
    for component, container in found.items():
        assert container["args"][:4] == ["python", "-P", "-m", ROLES[component].module]
        assert container["name"] == component


@every_values_file
def test_every_variable_is_a_setting_of_that_very_service_and_can_be_read(name: str) -> None:
    for role, component, container, _ in services(render(name)):
        env = environment_of(container)
        unknown = env.keys() - {role.variable(field) for field in role.fields} - OTHERS
        assert not unknown, f"{component} has no setting for {unknown}"
        read(role, container)


@every_values_file
def test_ports_are_what_services_listen_on(name: str) -> None:
    for role, component, container, _ in services(render(name)):
        options = read(role, container)
        binds = {field: getattr(options, field) for field in role.fields if field.endswith("bind")}
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        names = {"bind": "grpc", "data_bind": "data", "health_bind": "health", "metrics_bind": "metrics"}
        assert {names[field]: int(bind.rpartition(":")[2]) for field, bind in binds.items()} == ports, component
        assert {bind.rpartition(":")[0] for bind in binds.values()} == {"[::]" if name == "everything" else "0.0.0.0"}


@every_values_file
def test_probes_ask_the_health_port_and_liveness_asks_for_the_loop_alone(name: str) -> None:
    for _, component, container, _ in services(render(name)):
        (health,) = [port["containerPort"] for port in container["ports"] if port["name"] == "health"]
        probes = {kind: container[f"{kind}Probe"]["grpc"] for kind in ("startup", "liveness", "readiness")}
        assert {probe["port"] for probe in probes.values()} == {health}
        assert probes["liveness"]["service"] == "live"
        assert "service" not in probes["readiness"]
        assert probes["startup"].get("service", "") == ("" if component in ("router", "worker") else "live")


def test_a_model_may_load_for_as_long_as_is_said() -> None:
    for minutes in (1, 45):
        for _, component, container, _ in services(render_values({"startup": {"minutes": minutes}})):
            probe = container["startupProbe"]
            if component in ("router", "worker"):
                assert probe["periodSeconds"] * probe["failureThreshold"] == 60 * minutes
    rollout = find(render_values({"startup": {"minutes": 45}}), "Deployment", "collegium-gateway")
    assert rollout["spec"]["progressDeadlineSeconds"] > 45 * 60


@every_values_file
def test_a_pod_has_time_to_drain(name: str) -> None:
    for role, component, container, spec in services(render(name)):
        drain_s = getattr(read(role, container), "drain_s", 0.0)
        pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert spec["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + 15, component
        # Those that are dialled by a Service wait until it has forgotten them; the others are found by the balancer.
        assert (pre_stop_s > 0) == (component in ("gateway", "balancer"))


@every_values_file
def test_pods_tell_others_where_they_are(name: str) -> None:
    host = "[10.0.0.7]" if name == "everything" else "10.0.0.7"  # IPv6 stands in brackets; the kubelet gives it without
    for role, component, container, _ in services(render(name)):
        options = read(role, container)
        if component == "balancer":
            continue
        assert options.advertise == f"{host}:{options.bind.rpartition(':')[2]}"
        balancer = find(render(name), "Service", "collegium-balancer" if name != "everything" else "all-balancer")
        assert options.balancer == f"{balancer['metadata']['name']}:{balancer['spec']['ports'][0]['port']}"
        if component == "worker":
            assert options.data_advertise == f"{host}:{options.data_bind.rpartition(':')[2]}"
            assert options.failure_domain == FROM_PODS["spec.nodeName"]


@pytest.mark.parametrize(
    ("worker", "threads"),
    [
        ({"resources": {"requests": {"cpu": "4"}}}, 4),
        ({"resources": {"requests": {"cpu": "1500m"}}}, 2),
        ({"resources": {"requests": {"cpu": None}}}, 0),  # as many as there are cores
        ({"threads": 7}, 7),
    ],
)
def test_threads_follow_the_cpus_that_are_asked_for(worker: Object, threads: int) -> None:
    for role, component, container, _ in services(render_values({"worker": worker})):
        if component == "worker":
            assert read(role, container).threads == threads
            assert environment_of(container)["OMP_NUM_THREADS"] == str(threads)


def test_settings_reach_their_service_unharmed() -> None:
    found = {component: read(role, container) for role, component, container, _ in services(render("everything"))}
    assert found["gateway"].max_queued_tokens == 2**24  # which Helm hands to templates as 1.6777216e+07
    assert found["gateway"].max_message_bytes == 2**23
    assert found["gateway"].stall_timeout_s == 2.5
    assert found["gateway"].router_wait_s == 10.0
    assert found["worker"].idle_start is True
    assert str(found["worker"].eviction) == "lru"
    assert found["router"].threads == 3
    assert found["balancer"].rebalance_s == 0.0
    assert found["balancer"].expected_workers == 1
    assert found["router"].otlp_endpoint == "http://collector.telemetry:4317"


def test_the_balancer_waits_for_the_workers_that_there_will_be() -> None:
    for role, component, container, _ in services(render_values({"worker": {"replicas": 5}})):
        if component == "balancer":
            assert read(role, container).expected_workers == 5


@every_values_file
def test_a_gpu_is_asked_for_where_it_is_used_and_nowhere_else(name: str) -> None:
    for role, component, container, _ in services(render(name)):
        device = getattr(read(role, container), "device", "cpu")
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == (1 if device == "cuda:0" else 0), component
    assert (name in ("one-node-gpus", "multi-node")) == ('nvidia.com/gpu": 1' in json.dumps(render(name)))


@every_values_file
def test_routers_and_workers_read_the_same_manifest_of_the_same_checkpoint(name: str) -> None:
    options = {component: read(role, container) for role, component, container, _ in services(render(name))}
    assert options["router"].manifest == options["worker"].manifest
    assert options["router"].model == options["gateway"].model
    assert options["router"].dtype == options["worker"].dtype
    for _, component, container, spec in services(render(name)):
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        if component != "balancer" and name in ("one-node-gpus", "multi-node", "everything"):
            assert str(options["router"].model) in mounts
        makers = [one for one in spec.get("initContainers", []) if one["name"] == "make-manifest"]
        assert len(makers) == (1 if component in ("router", "worker") and name != "everything" else 0)
        for maker in makers:
            path = str(options["router"].model), "--out", str(options["router"].manifest)
            assert tuple(maker["args"]) == ("collegium", "manifest", *path)


def test_a_gateway_fetches_no_weights() -> None:
    for _, component, _, spec in services(render("multi-node")):
        fetchers = [one for one in spec.get("initContainers", []) if one["name"] == "fetch-model"]
        assert len(fetchers) == (0 if component == "balancer" else 1)
        assert all(("--exclude=*.safetensors" in one["args"]) == (component == "gateway") for one in fetchers)
        if fetchers:
            assert spec["initContainers"][0] is fetchers[0]


@every_values_file
def test_every_container_is_locked_up(name: str) -> None:
    for pod, _, spec in pods(render(name)):
        of_pod = spec["securityContext"]
        assert of_pod["runAsNonRoot"] is True and of_pod["runAsUser"] > 0, pod
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in containers(spec):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, (pod, container["name"])
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context.get("privileged")
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys() or name == "everything"
            assert "memory" in container["resources"]["limits"]
            assert not container["image"].endswith(":latest") and re.search(r":[^/]+$", container["image"])


@every_values_file
def test_what_is_mounted_is_there_and_what_is_written_is_mounted(name: str) -> None:
    for pod, _, spec in pods(render(name)):
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in containers(spec):
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            claimed = {"data"} if pod.endswith("valkey") else set[str]()
            assert mounts.keys() <= volumes | claimed, (pod, container["name"])
    for _, component, container, _ in services(render(name)):
        env = environment_of(container)
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert {env["HOME"], env.get("XDG_CACHE_HOME", "/tmp")} <= writable, component


@every_values_file
def test_no_secret_stands_in_plain_text(name: str) -> None:
    assert not of_kind(render(name), "Secret")
    for role, _, container, _ in services(render(name)):
        secrets = {
            role.variable(field) for field in role.fields if role.fields[field].metadata["collegium.setting"].secret
        }
        for one in container["env"]:
            if one["name"] in secrets and "value" in one:
                assert not re.search(r"://[^/]*:(?!\$\()[^/@]*@", one["value"])


@every_values_file
def test_every_service_account_exists_and_none_is_shared(name: str) -> None:
    made = {one["metadata"]["name"] for one in of_kind(render(name), "ServiceAccount")}
    used = [spec["serviceAccountName"] for _, _, spec in pods(render(name)) if "serviceAccountName" in spec]
    assert len(set(used)) == len(used)
    assert set(used) - made == ({"workers"} if name == "everything" else set())
    assert made <= set(used)
