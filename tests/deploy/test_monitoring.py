"""Alerts and dashboards ask for metrics that exist, with labels that they have, and every alert is explained."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from collegium.fabric.metrics import METRICS
from tests.deploy.helm import CHART, NAMESPACE, ROOT, find, of_kind, pods, render, render_values, selects

DASHBOARD = CHART / "files" / "dashboards" / "collegium.json"
# What Prometheus and the scraping add to a metric's own labels.
ADDED = {"namespace", "pod", "component", "le"}
_SELECTOR = re.compile(r"(collegium_\w+?)(_bucket|_sum|_count)?\{([^}]*)\}")


def alerts() -> list[dict[str, Any]]:
    (rule,) = of_kind(render("everything"), "PrometheusRule")
    return [one for group in rule["spec"]["groups"] for one in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def check(expression: str) -> None:
    """Check the metrics of an expression, their kinds and their labels."""
    named = re.findall(r"collegium_\w+", expression)
    found = _SELECTOR.findall(expression)
    assert found and len(found) == len(named), expression
    for name, suffix, matchers in found:
        metric = METRICS[name]
        assert metric.role != "worker", f"{name}: single workers are not scraped unless asked for"
        assert bool(suffix) == (metric.kind == "histogram"), expression
        labels = set(re.findall(r"(\w+)\s*[=!]~?\s*\"", matchers))
        assert {"namespace", "pod"} <= labels <= ADDED | set(metric.labels), expression
        if metric.kind != "gauge":
            assert re.search(rf"(rate|increase)\({name}", expression), f"{name} only ever grows: {expression}"
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        known = ADDED.union(*(METRICS[name].labels for name, _, _ in found))
        assert set(re.split(r",\s*", grouped)) <= known, expression


def test_alerts_ask_for_what_exists() -> None:
    assert len(alerts()) > 8
    for alert in alerts():
        check(alert["expr"])
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}


# Alert, how many of it fire after 50 minutes, and what is scraped every minute: metric, pod, values, further labels.
SCENES: list[tuple[str, int, list[tuple[str, str, str, dict[str, str]]]]] = [
    (
        "CollegiumRequestsLost",
        1,
        [("collegium_request_failure_total", "gateway-a", "_x48 1x9", {"code": "UNAVAILABLE"})],
    ),
    (
        "CollegiumRequestsLost",
        1,
        [("collegium_request_failure_total", "gateway-a", "7x47 8x9", {"code": "INTERNAL"})],
    ),
    (
        "CollegiumRequestsLost",
        0,
        [
            ("collegium_request_failure_total", "gateway-a", "0+5x60", {"code": "CANCELLED"}),
            ("collegium_request_failure_total", "gateway-a", "3x60", {"code": "INTERNAL"}),
        ],
    ),
    ("CollegiumRequestsShed", 1, [("collegium_requests_shed_total", "gateway-a", "0+5x60", {})]),
    ("CollegiumNoRouter", 1, [("collegium_routers_attached", "gateway-a", "0x60", {})]),
    ("CollegiumBalancerStale", 1, [("collegium_view_age_seconds", "router-0", "0+60x60", {})]),
    ("CollegiumBalancerStale", 0, [("collegium_view_age_seconds", "router-0", "1x60", {})]),
    (
        "CollegiumBalancersWithoutLeader",
        0,
        [("collegium_balancer_is_leader", f"balancer-{pod}", f"{leads}x60", {}) for pod, leads in (("a", 1), ("b", 0))],
    ),
    (
        "CollegiumBalancersWithoutLeader",
        1,
        [("collegium_balancer_is_leader", f"balancer-{pod}", "0x60", {}) for pod in ("a", "b")],
    ),
    ("CollegiumBalancerWithoutMemory", 1, [("collegium_balancer_has_memory", "balancer-a", "0x60", {})]),
    (
        "CollegiumRouterWithoutWorkers",
        1,
        [("collegium_links", "router-0", "0x60", {})],
    ),
    (
        "CollegiumRouterMissesWorkers",
        1,
        [
            ("collegium_links", "router-0", "1x60", {}),
            ("collegium_links", "router-1", "2x60", {}),
            *(("collegium_members", f"balancer-{pod}", "2x60", {"role": "worker"}) for pod in ("a", "b")),
        ],
    ),
    ("CollegiumWorkersMissing", 1, [("collegium_members", "balancer-a", "1x60", {"role": "worker"})]),
    (
        "CollegiumUnbalanced",
        1,
        [("collegium_expert_balancedness", "balancer-a", "0.3x60", {"phase": "decode", "statistic": "mean"})],
    ),
    (
        "CollegiumUnbalanced",
        0,
        [("collegium_expert_balancedness", "balancer-a", "0.9x60", {"phase": "decode", "statistic": "mean"})],
    ),
    (
        "CollegiumEventLoopLate",
        1,
        [
            ("collegium_event_loop_lag_seconds_bucket", "router-0", values, {"le": bound})
            for bound, values in (("0.5", "0x60"), ("1.0", "0+10x60"), ("+Inf", "0+10x60"))
        ],
    ),
]


def test_every_alert_has_a_scene_in_which_it_fires() -> None:
    assert {alert["alert"] for alert in alerts()} == {alert for alert, fires, _ in SCENES if fires}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool on PATH")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    def series(metric: str, pod: str, labels: dict[str, str]) -> str:
        named = {"namespace": NAMESPACE, "pod": f"moe-all-{pod}", **labels}
        return f"{metric}{{{','.join(f'{key}={json.dumps(value)}' for key, value in named.items())}}}"

    scenes = [
        {
            "interval": "1m",
            "name": alert,
            "input_series": [
                {"series": series(metric, pod, labels), "values": values} for metric, pod, values, labels in scraped
            ],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
                    "eval_time": "50m",
                    "exp_samples": [{"value": fires}],
                }
            ],
        }
        for alert, fires, scraped in SCENES
    ]
    (rule,) = of_kind(render("everything"), "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": rule["spec"]["groups"]}))
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": scenes}
    (tmp_path / "scenes.yaml").write_text(json.dumps(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", "scenes.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_explained_and_no_other() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert {alert["alert"] for alert in alerts()} == set(re.findall(r"`(Collegium[A-Z]\w+)`", text))


def test_panels_ask_for_what_exists() -> None:
    assert len(panels()) > 15
    for panel in panels():
        for target in panel["targets"]:
            check(target["expr"])


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_is_one_file_wherever_it_is_looked_for() -> None:
    linked = ROOT / "deploy" / "grafana" / "collegium.json"
    assert linked.resolve() == DASHBOARD
    assert not Path(linked).readlink().is_absolute()
    config = find(render("everything"), "ConfigMap", "all-dashboards")
    assert json.loads(config["data"]["collegium.json"]) == json.loads(DASHBOARD.read_text())
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_pod_monitor_leaves_out_single_workers_unless_asked_for() -> None:
    (monitor,) = of_kind(render_values({"metrics": {"podMonitor": {"enabled": True}}}), "PodMonitor")
    (roles,) = monitor["spec"]["selector"]["matchExpressions"]
    assert set(roles["values"]) == {"gateway", "router", "balancer"}


def test_the_pod_monitor_finds_every_service_and_its_port() -> None:
    objects = render("everything")
    (monitor,) = of_kind(objects, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (roles,) = monitor["spec"]["selector"]["matchExpressions"]
    found: set[str] = set()
    for _, labels, spec in pods(objects):
        component = labels["app.kubernetes.io/component"]
        matches = selects({"matchLabels": monitor["spec"]["selector"]["matchLabels"]}, labels)
        if matches and component in roles["values"]:
            found.add(component)
            assert endpoint["port"] in {port["name"] for c in spec["containers"] for port in c["ports"]}
    assert found == set(roles["values"]) == {"gateway", "router", "worker", "balancer"}


def test_what_needs_other_peoples_kinds_is_off_unless_asked_for() -> None:
    for name in ("default", "cpu", "one-node-gpus", "multi-node"):
        groups = {one["apiVersion"].partition("/")[0] for one in render(name)}
        assert groups <= {"v1", "apps", "autoscaling", "policy", "networking.k8s.io"}


def test_scaling_of_routers_asks_for_what_exists() -> None:
    (scaler,) = of_kind(render("everything"), "ScaledObject")
    (trigger,) = scaler["spec"]["triggers"]
    check(trigger["metadata"]["query"])
    assert yaml.safe_load(trigger["metadata"]["threshold"]) > 0
