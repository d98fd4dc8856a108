"""The process's metrics by OTLP: what the page shows, sent to a collector every so often.

Owns the thread that sends and the translation. The numbers are those of the page, read at the same place, so that the
two never differ; there is no second set of instruments.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtlpMetric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric, Sample

from collegium.fabric import logs
from collegium.fabric.channels import NO_PROXY
from collegium.fabric.metric_names import METRICS
from collegium.fabric.metrics import MetricsRegistry

_TIMEOUT_S = 2.0
_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1", "tokens": "{token}"}
_CUMULATIVE = AggregationTemporality.CUMULATIVE
_log = logs.get("telemetry")
_BY_FAMILY = {metric.name.removesuffix("_total"): metric for metric in METRICS.values()}


class MetricsPush:
    """Sends a registry's metrics until it is stopped, once more then."""

    def __init__(
        self, source: MetricsRegistry, endpoint: str, resource: Resource, every_s: float, *, start_ns: int
    ) -> None:
        """start_ns: when counting began, in time.time_ns()."""
        self._source, self._resource, self._every_s, self._start_ns = source, resource, every_s, start_ns
        self._endpoint = endpoint
        self._exporter = OTLPMetricExporter(
            endpoint=endpoint,
            insecure=not endpoint.startswith("https"),
            timeout=_TIMEOUT_S,
            channel_options=cast("Any", NO_PROXY),
        )
        # It says at every failure what is said here once.
        logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").addFilter(_is_of_traces)
        self._is_failing = False
        self._stopping = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Send once more and end; waits for a collector that does not answer no longer than for one attempt."""
        self._stopping.set()
        self._thread.join(2 * _TIMEOUT_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.flush()
        if not self._is_failing:
            self.flush()

    def flush(self) -> None:
        """Send now, from the caller's thread; blocks for seconds where the endpoint is gone."""
        with self._sending:
            self._send()

    def _send(self) -> None:
        why = "it refuses them or does not answer"
        try:
            data = to_otlp(self._source, self._resource, start_ns=self._start_ns, now_ns=time.time_ns())
            has_failed = self._exporter.export(data) is not MetricExportResult.SUCCESS
        except Exception as error:  # whatever it is, what is counted must be sent the next time
            has_failed, why = True, f"{type(error).__name__}: {error}"
        if has_failed and not self._is_failing:
            _log.warning(
                "metrics cannot be sent; trying on, and serving is not affected", endpoint=self._endpoint, why=why
            )
        elif self._is_failing and not has_failed:
            _log.info("metrics are sent again", endpoint=self._endpoint)
        self._is_failing = has_failed


def _is_of_traces(record: logging.LogRecord) -> bool:
    return "metrics" not in (record.args or ())  # what is exported is an argument of its own, beside the endpoint


def to_otlp(source: MetricsRegistry, resource: Resource, *, start_ns: int, now_ns: int) -> MetricsData:
    """Write everything that a registry counts as OpenTelemetry's cumulative data; times are time.time_ns()."""
    metrics = [
        written for family in source.prometheus.collect() if (written := _written(family, start_ns, now_ns)) is not None
    ]
    scope = ScopeMetrics(scope=InstrumentationScope("collegium"), metrics=metrics, schema_url="")
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=[scope], schema_url="")])


def _written(family: Metric, start_ns: int, now_ns: int) -> OtlpMetric | None:
    known = _BY_FAMILY.get(family.name)
    suffix = "_total" if family.type == "counter" else ""
    name = family.name + suffix if known is None else known.otlp_name
    unit = family.name.rpartition("_")[2] if known is None else known.unit
    attributes = {} if known is None else dict(zip(known.labels, known.otlp_labels, strict=True))
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    if not samples:
        return None
    if family.type == "histogram":
        data = Histogram(_distributions(family.name, samples, attributes, start_ns, now_ns), _CUMULATIVE)
    else:
        points = [
            NumberDataPoint(_named(sample.labels, attributes), start_ns, now_ns, sample.value) for sample in samples
        ]
        data = Sum(points, _CUMULATIVE, is_monotonic=True) if family.type == "counter" else Gauge(points)
    return OtlpMetric(name=name, description=family.documentation, unit=_UNITS.get(unit, ""), data=data)


def _distributions(
    name: str, samples: Sequence[Sample], attributes: dict[str, str], start_ns: int, now_ns: int
) -> list[HistogramDataPoint]:
    """Take a page's cumulative buckets apart, one point per set of labels."""
    by_labels: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        key = tuple((label, value) for label, value in sample.labels.items() if label != "le")
        by_labels.setdefault(key, []).append(sample)
    points: list[HistogramDataPoint] = []
    for key, own in by_labels.items():
        buckets = [(float(one.labels["le"]), int(one.value)) for one in own if one.name == f"{name}_bucket"]
        below = [0, *(count for _, count in buckets)]
        points.append(
            HistogramDataPoint(
                attributes=_named(dict(key), attributes),
                start_time_unix_nano=start_ns,
                time_unix_nano=now_ns,
                count=below[-1],
                sum=next(one.value for one in own if one.name == f"{name}_sum"),
                bucket_counts=[count - before for before, count in itertools.pairwise(below)],
                explicit_bounds=[bound for bound, _ in buckets[:-1]],
                min=cast("float", None),  # not known, which the encoder takes for absent
                max=cast("float", None),
            )
        )
    return points


def _named(labels: dict[str, str], attributes: dict[str, str]) -> dict[str, str]:
    """Name labels as OpenTelemetry does; an empty one is one that is not there."""
    return {attributes.get(label, label): value for label, value in labels.items() if value}
