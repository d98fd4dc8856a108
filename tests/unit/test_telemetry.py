"""Metrics: one registry of names; plain counters become a page. Logs: an event and its fields, in two forms."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from collegium.fabric import logs, metrics, telemetry_page
from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.fabric.metrics import METRICS, MetricsRegistry, series, serve_metrics


def page(registry: MetricsRegistry) -> list[str]:
    return generate_latest(registry.prometheus).decode().splitlines()


def test_counters_of_a_service_are_shown_by_series_with_their_help() -> None:
    registry = MetricsRegistry()
    registry.expose(
        lambda: {
            series("collegium_steps_total", kind="mixed"): 3,
            series("collegium_steps_total", kind="decode"): 5,
            series("collegium_num_requests_running"): 2,
            "free_kv_blocks": 9,
        }
    )
    lines = page(registry)
    assert 'collegium_steps_total{kind="mixed"} 3.0' in lines
    assert 'collegium_steps_total{kind="decode"} 5.0' in lines
    assert "collegium_num_requests_running 2.0" in lines
    assert "# TYPE collegium_steps_total counter" in lines
    assert f"# HELP collegium_steps_total {METRICS['collegium_steps_total'].help}" in lines
    assert not any("free_kv_blocks" in line for line in lines), "what is not registered is for status pages only"


def test_the_same_series_from_two_services_in_one_process_is_summed_and_ends_with_them() -> None:
    registry = MetricsRegistry()
    registry.expose(lambda: {"collegium_num_preemptions_total": 1})
    end = registry.expose(lambda: {"collegium_num_preemptions_total": 2})
    assert "collegium_num_preemptions_total 3.0" in page(registry)
    end()
    assert "collegium_num_preemptions_total 1.0" in page(registry)


def test_distributions_are_made_once_with_their_buckets() -> None:
    registry = MetricsRegistry()
    registry.histogram("collegium_time_to_first_token_seconds").observe(0.03)
    assert registry.histogram("collegium_time_to_first_token_seconds") is registry.histogram(
        "collegium_time_to_first_token_seconds"
    )
    assert 'collegium_time_to_first_token_seconds_bucket{le="0.05"} 1.0' in page(registry)


def test_names_follow_one_convention() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert name.startswith("collegium_") != bool(metric.otlp)
        assert metric.help
        assert name.endswith("_total") == (metric.kind == "counter")


@pytest.mark.parametrize(
    ("name", "labels", "error"),
    [("collegium_nothing", {}, KeyError), ("collegium_steps_total", {}, ValueError)],
    ids=["name", "label"],
)
def test_a_series_that_is_not_registered_is_refused(name: str, labels: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        series(name, **labels)


def test_the_page_is_served_with_the_processes_own_metrics() -> None:
    url = serve_metrics("127.0.0.1:0")
    with urllib.request.urlopen(url, timeout=30) as response:
        assert b"process_resident_memory_bytes" in response.read()
    address = url.removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(FailedPrecondition, match=r"--metrics-bind=.* cannot be listened on"):
        serve_metrics(address)
    assert serve_metrics("") == ""
    assert serve_metrics("0.0.0.0:0", advertise="fd00::7:1").startswith("http://[fd00::7]:")
    with pytest.raises(SettingsError, match="give HOST:PORT"):
        serve_metrics("nonsense")
    metrics.stop_metrics()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("collegium")
    before = (list(root.handlers), root.level, ours.level)
    yield
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])


def test_a_text_line_is_an_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", form="text", service="router")
    logs.get("links").info("link open", worker_id="w1", address="a b", took_s=0.12345678)
    logs.get("links").debug("not shown")
    line = capsys.readouterr().err
    assert line.endswith(' INFO router/links link open worker_id=w1 address="a b" took_s=0.123457\n')


def test_a_json_line_is_one_object_with_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", form="json", service="router")
    try:
        raise ValueError("odd")
    except ValueError:
        logs.get("links").exception("failed", worker_id="w1")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["service"], line["logger"], line["event"]) == ("error", "router", "links", "failed")
    assert line["worker_id"] == "w1"
    assert "ValueError: odd" in line["exception"]


def test_a_logger_says_what_is_logged() -> None:
    logs.configure(level="warning", form="text")
    assert not logs.get("links").is_enabled_for("info")
    assert logs.get("links").is_enabled_for("error")


def test_the_page_of_names_is_the_registrys() -> None:
    path = Path(__file__).parents[2] / "docs" / "telemetry.md"
    if os.environ.get("COLLEGIUM_RENEW"):
        path.write_text(telemetry_page.render())
    assert path.read_text() == telemetry_page.render(), "run `make docs`"


def test_what_is_bound_is_on_every_line_of_its_task_and_on_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", form="json", service="gateway")

    async def one(request_id: str) -> None:
        logs.bind(trace_id="t1")
        logs.bind(request_id=request_id)
        await asyncio.sleep(0)
        logs.get("gateway").info("replaying", lost="r1")

    async def two() -> None:
        await asyncio.gather(one("a"), one("b"))
        logs.get("gateway").info("serving")

    asyncio.run(two())
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line.get("request_id"), line.get("trace_id")) for line in lines] == [
        ("a", "t1"),
        ("b", "t1"),
        (None, None),
    ]
    assert lines[0]["lost"] == "r1"
