"""Alerts and dashboards ask for metrics that exist, with labels that they have, and every alert is explained."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from collegium.fabric.metrics import METRICS
from tests.deploy.helm import CHART, ROOT, find, of_kind, pods, render, selects

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
