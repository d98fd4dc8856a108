"""What the page shows and what OTLP carries are the same numbers, under the names of the one registry."""

from __future__ import annotations

from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.sdk.resources import Resource
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from collegium.fabric.metrics import METRICS, MetricsRegistry, page, series
from collegium.fabric.otlp_metrics import MetricsPush, to_otlp
from tests.collector import Collector


def counting() -> MetricsRegistry:
    registry = MetricsRegistry()
    registry.expose(
        lambda: {
            series("collegium_steps_total", kind="mixed"): 3,
            series("collegium_steps_total", kind="decode"): 5,
            series("collegium_num_requests_running"): 2,
            series("collegium_request_success_total", finished_reason="stop"): 4,
            series("collegium_request_success_total", finished_reason="cancelled"): 1,
        }
    )
    for seconds in (0.002, 0.03, 0.04, 100.0):
        registry.histogram("collegium_time_to_first_token_seconds").observe(seconds)
    labels = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "collegium", "gen_ai_request_model": "m"}
    registry.histogram("gen_ai_server_request_duration_seconds").labels(**labels, error_type="").observe(0.3)
    registry.histogram("gen_ai_server_request_duration_seconds").labels(**labels, error_type="INTERNAL").observe(0.5)
    return registry


def by_otlp(registry: MetricsRegistry) -> dict[str, metrics_pb2.Metric]:
    """Encode as the exporter does: metrics by name."""
    data = to_otlp(registry, Resource.create({"service.name": "x"}), start_ns=1_000, now_ns=2_000)
    (resource,) = encode_metrics(data).resource_metrics
    (scope,) = resource.scope_metrics
    return {metric.name: metric for metric in scope.metrics}


def named(point: Any) -> dict[str, str]:
    return {attribute.key: attribute.value.string_value for attribute in point.attributes}


def test_counters_and_gauges_keep_their_kinds_values_and_labels() -> None:
    found = by_otlp(counting())
    steps = found["collegium_steps_total"].sum
    assert steps.is_monotonic
    assert steps.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
    assert {named(point)["kind"]: point.as_double for point in steps.data_points} == {"mixed": 3, "decode": 5}
    assert {(point.start_time_unix_nano, point.time_unix_nano) for point in steps.data_points} == {(1_000, 2_000)}
    (running,) = found["collegium_num_requests_running"].gauge.data_points
    assert running.as_double == 2
    assert found["process_resident_memory_bytes"].unit == "By"
    assert found["process_cpu_seconds_total"].sum.is_monotonic


def test_distributions_are_taken_apart_into_their_buckets() -> None:
    metric = by_otlp(counting())["collegium_time_to_first_token_seconds"]
    (point,) = metric.histogram.data_points
    bounds = METRICS["collegium_time_to_first_token_seconds"].buckets
    assert metric.unit == "s"
    assert tuple(point.explicit_bounds) == bounds
    assert len(point.bucket_counts) == len(bounds) + 1
    assert (point.count, sum(point.bucket_counts), point.bucket_counts[-1]) == (4, 4, 1)
    assert point.bucket_counts[bounds.index(0.05)] == 2
    assert abs(point.sum - 100.072) < 1e-9
    assert not point.HasField("min") and not point.HasField("max")


def test_open_telemetrys_names_and_attributes_are_used_where_it_has_them() -> None:
    points = by_otlp(counting())["gen_ai.server.request.duration"].histogram.data_points
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "collegium", "gen_ai.request.model": "m"}
    failed = {**common, "error.type": "INTERNAL"}
    found = sorted((named(point) for point in points), key=len)
    assert found == [common, failed], "no error is no attribute"


def families(registry: MetricsRegistry, prefix: str) -> dict[str, Any]:
    text = generate_latest(page(registry, prefix)).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_vllms_names_and_labels_are_given_where_vllm_has_the_same() -> None:
    registry = counting()
    registry.model_name = "moe"
    found = families(registry, "vllm")
    ended, aborted = found["vllm:request_success"].samples
    assert aborted.labels["finished_reason"] == "abort", "its word for what a caller has ended"
    assert (ended.name, ended.value) == ("vllm:request_success_total", 4)
    assert ended.labels == {"model_name": "moe", "engine": "0", "finished_reason": "stop"}
    buckets = [one for one in found["vllm:time_to_first_token_seconds"].samples if one.name.endswith("_bucket")]
    assert {"model_name", "engine", "le"} == set(buckets[0].labels)
    assert "collegium_request_success" not in found
    assert "collegium_steps" in found, "what vLLM has not stays ours"
    assert "gen_ai_server_request_duration_seconds" in found


def test_the_page_holds_each_number_once() -> None:
    found = families(counting(), "collegium")
    assert "collegium_request_success" in found
    assert not any(name.startswith("vllm:") for name in found)
    assert not any(sample.name.endswith("_created") for family in found.values() for sample in family.samples)


def test_a_count_that_cannot_be_read_once_is_sent_the_next_time(collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    registry = MetricsRegistry()
    readings = iter([RuntimeError("dictionary changed size during iteration"), {"collegium_num_requests_running": 7.0}])

    def read() -> dict[str, float]:
        reading = next(readings)
        if isinstance(reading, RuntimeError):
            raise reading
        return reading

    registry.expose(read)
    push = MetricsPush(registry, endpoint, Resource.create({"service.name": "x"}), 3600.0, start_ns=1)
    push.flush()
    assert not received.metrics
    push.flush()
    (running,) = received.metrics["x"]["collegium_num_requests_running"].gauge.data_points
    assert running.as_double == 7
    push.start()
    push.stop()


def test_vllms_names_are_vllms() -> None:
    # As listed at docs.vllm.ai, "Production Metrics", for the engine of version 1.
    theirs = {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    }
    assert {metric.vllm for metric in METRICS.values() if metric.vllm} == theirs
