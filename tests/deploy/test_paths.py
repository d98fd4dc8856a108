"""Who may talk to whom, what Services lead to, and what budgets and spreading hold on to."""

from typing import Any

import pytest

from tests.deploy.helm import NAMESPACE, VALUES, Object, find, of_kind, pods, render, render_values, selects, values_of
from tests.deploy.services import ROLES

every_values_file = pytest.mark.parametrize("name", VALUES)

# The data path and the control path of ARCHITECTURE.md: who dials whom, at which of its ports.
PATHS = {
    ("gateway", "router", "grpc"),
    ("router", "worker", "grpc"),
    ("router", "worker", "data"),
    ("gateway", "balancer", "grpc"),
    ("router", "balancer", "grpc"),
    ("worker", "balancer", "grpc"),
    ("balancer", "memory", "redis"),
    ("test", "gateway", "grpc"),  # helm test
}


def components(objects: list[Object]) -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """Give (labels, ports by name) of every component's pods."""
    found: dict[str, tuple[dict[str, str], dict[str, int]]] = {}
    for _, labels, spec in pods(objects):
        ports = {p["name"]: p["containerPort"] for c in spec["containers"] for p in c.get("ports", [])}
        found[labels["app.kubernetes.io/component"]] = labels, ports
    return found


def policy_of(objects: list[Object], labels: dict[str, str]) -> Object:
    """Give the one policy that selects a pod."""
    (policy,) = [
        one["spec"] for one in of_kind(objects, "NetworkPolicy") if selects(one["spec"]["podSelector"], labels)
    ]
    return policy


def admits(rules: list[Object], key: str, labels: dict[str, str], port: int) -> bool:
    """Say whether any rule lets a pod of this release through at a port."""
    for rule in rules:
        at_port = any(one["port"] == port and one.get("protocol", "TCP") == "TCP" for one in rule["ports"])
        peers = rule.get(key)
        is_peer = peers is None or any(
            "namespaceSelector" not in peer and "ipBlock" not in peer and selects(peer["podSelector"], labels)
            for peer in peers
        )
        if at_port and is_peer:
            return True
    return False


@every_values_file
def test_the_paths_that_exist_are_open_and_no_others(name: str) -> None:
    objects = render(name)
    known = components(objects)
    tried = {
        (caller, called, port)
        for caller in known
        for called, (_, ports) in known.items()
        for port in ports
        if called != caller
    }
    for caller, called, port in sorted(tried):
        labels, ports = known[called]
        caller_labels, _ = known[caller]
        may_go = admits(policy_of(objects, caller_labels).get("egress", []), "to", labels, ports[port])
        may_come = admits(policy_of(objects, labels).get("ingress", []), "from", caller_labels, ports[port])
        is_path = (caller, called, port) in PATHS
        # Everyone may come to a gateway where no clients are named; then it is the caller's policy that holds it back.
        is_open = may_go and may_come
        assert is_open == is_path, f"{caller} -> {called}:{port}: egress {may_go}, ingress {may_come}"
    assert {path for path in PATHS if path[1] in known} <= tried


@every_values_file
def test_every_pod_has_a_policy_for_both_directions_and_every_port_in_it_is_one(name: str) -> None:
    objects = render(name)
    known = components(objects)
    for component, (labels, ports) in known.items():
        policy = policy_of(objects, labels)
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        for rule in policy.get("ingress", []):
            assert rule["ports"]
            assert {one["port"] for one in rule["ports"]} <= set(ports.values()), component
    others = {port for _, ports in known.values() for port in ports.values()} | {53, 4317, 6380, 443}
    for policy in of_kind(objects, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            assert {one["port"] for one in rule["ports"]} <= others
        assert any(selects(policy["spec"]["podSelector"], labels) for labels, _ in known.values())


def peers(objects: list[Object], component: str, key: str, port: int) -> list[Any]:
    """Give the peers that a component's policy names at a port; None for everyone."""
    labels, _ = components(objects)[component]
    policy = policy_of(objects, labels)
    rules = policy.get("ingress" if key == "from" else "egress", [])
    return [rule.get(key) for rule in rules if port in {one["port"] for one in rule["ports"]}]


def test_the_outside_comes_and_is_reached_where_values_say_so() -> None:
    assert peers(render("default"), "gateway", "from", 50051) == [None]
    everything, values = render("everything"), values_of("everything")["networkPolicy"]
    (clients,) = peers(everything, "gateway", "from", 50051)
    assert clients[0] == values["clients"][0]
    test_labels, _ = components(everything)["test"]
    assert [selects(one["podSelector"], test_labels) for one in clients[1:]] == [True]
    for role in ROLES:
        assert peers(everything, role, "from", 8081) == [values["probesFrom"]]
        assert peers(everything, role, "to", 4317) == [values["otlpTo"]]
        assert peers(render("default"), role, "to", 4317) == []
        (metrics,) = peers(everything, role, "from", 9090)
        assert metrics[0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
        (dns,) = peers(everything, role, "to", 53)
        assert dns[0]["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    assert peers(everything, "balancer", "to", 6380) == [values["redisTo"]]
    for role in ROLES:
        assert peers(render("multi-node"), role, "to", 443) == ([] if role == "balancer" else [None])


def test_policies_can_be_left_out() -> None:
    values = {"networkPolicy": {"enabled": False}, "valkey": {"networkPolicy": {"enabled": False}}}
    assert not of_kind(render_values(values), "NetworkPolicy")


@every_values_file
def test_services_lead_to_ports_that_are_there(name: str) -> None:
    objects = render(name)
    known = components(objects)
    for service in of_kind(objects, "Service"):
        led = [
            ports for labels, ports in known.values() if selects({"matchLabels": service["spec"]["selector"]}, labels)
        ]
        assert len(led) == 1, service["metadata"]["name"]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= led[0].keys()
    for owner in of_kind(objects, "StatefulSet"):
        (service,) = [
            one for one in of_kind(objects, "Service") if one["metadata"]["name"] == owner["spec"]["serviceName"]
        ]
        assert service["spec"]["selector"] == owner["spec"]["selector"]["matchLabels"]


@every_values_file
def test_controllers_budgets_and_scalers_hold_on_to_what_is_theirs(name: str) -> None:
    objects = render(name)
    for owner in of_kind(objects, "Deployment", "StatefulSet"):
        labels = owner["spec"]["template"]["metadata"]["labels"]
        assert selects(owner["spec"]["selector"], labels)
        for constraint in owner["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selects(constraint["labelSelector"], labels)
    budgets = of_kind(objects, "PodDisruptionBudget")
    held = [
        component
        for budget in budgets
        for component, (labels, _) in components(objects).items()
        if selects(budget["spec"]["selector"], labels)
    ]
    # In `everything` the balancers' budget is switched off, and there is no Valkey.
    assert sorted(held) == sorted({*ROLES, "memory"} - ({"balancer", "memory"} if name == "everything" else set()))
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        (owner,) = [
            one for one in objects if (one["kind"], one["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        assert "replicas" not in owner["spec"], "two would decide on the number of replicas"


def allowed(spec: Object, num_pods: int) -> int:
    """Say how many of the pods of a budget, all of them ready, may be evicted at once, as Kubernetes reckons."""
    if "minAvailable" in spec:
        assert "maxUnavailable" not in spec, "the API server takes one of them"
        return max(0, num_pods - spec["minAvailable"])
    most = spec["maxUnavailable"]
    share = -(-num_pods * int(most.removesuffix("%")) // 100) if isinstance(most, str) else most
    return min(share, num_pods)


def fewest(objects: list[Object], labels: dict[str, str]) -> int:
    """Say how many pods there are at least of a component."""
    (owner,) = [
        one for one in of_kind(objects, "Deployment", "StatefulSet") if selects(one["spec"]["selector"], labels)
    ]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        if scaler["spec"]["scaleTargetRef"]["name"] == owner["metadata"]["name"]:
            return scaler["spec"].get("minReplicas", scaler["spec"].get("minReplicaCount"))
    return owner["spec"]["replicas"]


SIZES: list[Object] = [
    {},
    {role: {"replicas": 1} for role in ROLES} | {"gateway": {"replicas": 1, "autoscaling": {"enabled": False}}},
    {"gateway": {"autoscaling": {"minReplicas": 1}}, "router": {"replicas": 5}},
    {"router": {"replicas": 7, "keda": {"enabled": True, "serverAddress": "http://p", "minReplicas": 1}}},
    {"worker": {"replicas": 2, "podDisruptionBudget": {"maxUnavailable": 2}}},
    {"worker": {"replicas": 3, "podDisruptionBudget": {"maxUnavailable": "100%"}}},
    {"worker": {"replicas": 1, "podDisruptionBudget": {"maxUnavailable": "10%"}}},
    {"worker": {"replicas": 9, "podDisruptionBudget": {"maxUnavailable": "50%"}}},
    {"router": {"podDisruptionBudget": {"maxUnavailable": 0}}},
]


@pytest.mark.parametrize(
    "values",
    [*SIZES, *(values_of(name) for name in VALUES)],
    ids=[*(f"sizes-{i}" for i in range(len(SIZES))), *VALUES],
)
def test_no_budget_lets_the_last_pod_go(values: Object) -> None:
    objects = render_values(values)
    for component, (labels, _) in components(objects).items():
        for budget in of_kind(objects, "PodDisruptionBudget"):
            if selects(budget["spec"]["selector"], labels):
                least = fewest(objects, labels)
                for num_pods in range(least, least + 4):
                    assert allowed(budget["spec"], num_pods) < num_pods, (component, budget["spec"])
                assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
                if least > 1 and str(budget["spec"].get("maxUnavailable")) != "0":
                    assert allowed(budget["spec"], least) >= 1, "a drain would wait for ever"


def test_the_last_pod_goes_where_a_drain_must_not_wait() -> None:
    single = {"replicas": 1, "podDisruptionBudget": {"protectLast": False}}
    values: Object = dict.fromkeys(ROLES, single) | {"valkey": {"podDisruptionBudget": {"protectLast": False}}}
    values["gateway"] = {**single, "autoscaling": {"enabled": False}}
    budgets = of_kind(render_values(values), "PodDisruptionBudget")
    assert [allowed(budget["spec"], 1) for budget in budgets] == [1] * 5
    assert not of_kind(
        render_values(
            {role: {"podDisruptionBudget": {"enabled": False}} for role in ROLES}
            | {"valkey": {"podDisruptionBudget": {"enabled": False}}}
        ),
        "PodDisruptionBudget",
    )


@every_values_file
def test_workers_are_spread_over_nodes_and_replaced_one_at_a_time(name: str) -> None:
    worker = find(render(name), "StatefulSet", "collegium-worker" if name != "everything" else "all-worker")["spec"]
    (constraint,) = worker["template"]["spec"]["topologySpreadConstraints"]
    assert (constraint["maxSkew"], constraint["topologyKey"]) == (1, "kubernetes.io/hostname")
    assert constraint["whenUnsatisfiable"] == ("DoNotSchedule" if name == "multi-node" else "ScheduleAnyway")
    assert worker["podManagementPolicy"] == "Parallel"
    assert worker["updateStrategy"] == {"type": "RollingUpdate"}  # one pod at a time, from the highest ordinal


@every_values_file
def test_every_object_carries_the_standard_labels_and_its_namespace(name: str) -> None:
    for one in render(name):
        what, labels = f"{one['kind']} {one['metadata']['name']}", one["metadata"]["labels"]
        standard = {f"app.kubernetes.io/{word}" for word in ("name", "instance", "version", "managed-by", "part-of")}
        assert {"helm.sh/chart", *standard} <= labels.keys(), what
        assert one["metadata"]["namespace"] == NAMESPACE, what
        if name == "everything":
            assert labels["team"] == "inference", what


def test_a_new_version_of_the_chart_alone_restarts_nothing() -> None:
    for pod, labels, _ in pods(render("default")):
        if pod != "moe-collegium-test":
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys(), pod


def test_valkey_restarts_when_its_configuration_changes() -> None:
    def checksum(values: Object) -> str:
        template = find(render_values({"valkey": values}), "StatefulSet", "valkey")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) != checksum({"maxMemory": "64mb"})


@pytest.mark.parametrize(("auth", "mode"), [({}, "no"), ({"existingSecret": "words"}, "yes")])
def test_valkey_asks_for_a_password_where_there_is_one(auth: Object, mode: str) -> None:
    objects = render_values({"valkey": {"auth": auth}})
    assert f"protected-mode {mode}" in find(objects, "ConfigMap", "valkey")["data"]["valkey.conf"]
    (balancer,) = find(objects, "Deployment", "collegium-balancer")["spec"]["template"]["spec"]["containers"]
    env = {one["name"]: one for one in balancer["env"]}
    assert ("$(VALKEY_PASSWORD)@" in env["REDIS_URL"]["value"]) == bool(auth)
    assert ("VALKEY_PASSWORD" in env) == bool(auth)
    assert NAMESPACE in env["COLLEGIUM_CLUSTER"]["value"]
