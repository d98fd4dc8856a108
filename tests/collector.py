"""A collector for tests: keeps every span and every metric that is exported to it by OTLP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True, slots=True)
class Received:
    """A span, and the service that sent it."""

    service: str
    span: Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what comes, in the order in which it comes."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.metrics: dict[str, dict[str, Metric]] = {}  # the newest by service and name

    @property
    def spans(self) -> dict[str, Span]:
        """The last span by each name."""
        return {one.span.name: one.span for one in self.received}

    @property
    def services(self) -> set[str]:
        """Services that sent spans."""
        return {one.service for one in self.received}

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = named(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.received += [Received(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, into: Collector) -> None:
        self._into = into

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: object
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        for resource in request.resource_metrics:
            service = named(resource.resource.attributes)["service.name"]
            for scope in resource.scope_metrics:
                self._into.metrics.setdefault(service, {}).update({metric.name: metric for metric in scope.metrics})
        return metrics_service_pb2.ExportMetricsServiceResponse()


def named(attributes: Iterable[KeyValue]) -> dict[str, str]:
    """Attributes by key, those that are no strings as text."""
    found: dict[str, str] = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        found[attribute.key] = str(getattr(attribute.value, kind)) if kind else ""
    return found


@contextmanager
def listening() -> Iterator[tuple[Collector, str]]:
    """Run a collector; gives it and its address."""
    servicer = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(servicer), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, f"http://127.0.0.1:{port}"
        server.stop(0).wait()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with listening() as running:
        yield running
