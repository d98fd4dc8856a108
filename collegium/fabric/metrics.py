"""One registry of all metric names that any service exposes, and the page that shows them.

Owns names, kinds, help texts and labels. Services count in plain numbers of their own and expose them by one callback;
only distributions are recorded here directly. Names follow vLLM's where it has the same thing.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.fabric.hosts import bracketed

Counters = Callable[[], Mapping[str, float]]
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricName:
    """What a metric is called, what kind it is, what it means, and its labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = _SECONDS


def _counter(name: str, help: str, *labels: str) -> MetricName:
    return MetricName(name=name, kind="counter", help=help, labels=labels)


def _gauge(name: str, help: str, *labels: str) -> MetricName:
    return MetricName(name=name, kind="gauge", help=help, labels=labels)


def _histogram(name: str, help: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> MetricName:
    return MetricName(name=name, kind="histogram", help=help, labels=labels, buckets=buckets)


METRICS: dict[str, MetricName] = {
    metric.name: metric
    for metric in (
        # gateway
        _counter("collegium_request_success_total", "Requests that ended well, by finish reason", "finish_reason"),
        _counter("collegium_request_failure_total", "Requests that failed, by canonical status", "code"),
        _counter("collegium_requests_shed_total", "Requests that admission refused"),
        _counter("collegium_requests_replayed_total", "Requests replayed on a router after another one was lost"),
        _counter("collegium_prompt_tokens_total", "Prompt tokens accepted"),
        _counter("collegium_generation_tokens_total", "Tokens generated"),
        _gauge("collegium_queued_tokens", "Tokens admitted and not yet generated or computed"),
        _gauge("collegium_routers_attached", "Routers that this gateway has a stream to"),
        _histogram("collegium_time_to_first_token_seconds", "From a request's arrival to its first token"),
        _histogram("collegium_inter_token_latency_seconds", "Between one token of a choice and the next"),
        _histogram("collegium_e2e_request_latency_seconds", "From a request's arrival to its end"),
        # router
        _gauge("collegium_num_requests_running", "Sequences being grown"),
        _gauge("collegium_num_requests_waiting", "Sequences that wait for KV blocks or their turn"),
        _gauge("collegium_kv_cache_usage_ratio", "Share of KV blocks in use"),
        _counter("collegium_preemptions_total", "Sequences preempted to free KV blocks"),
        _counter("collegium_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache"),
        _counter("collegium_prefix_cache_hits_total", "Prompt tokens found in the prefix cache"),
        _counter("collegium_prefilled_tokens_total", "Prompt tokens computed"),
        _counter("collegium_steps_total", "Steps by the kinds of rows that they held", "kind"),
        _counter("collegium_step_seconds_total", "Time spent in steps"),
        _counter("collegium_forward_seconds_total", "Of the time in steps, that of forward passes, waits included"),
        _counter("collegium_micro_batches_total", "Parts into which steps were split, one for a step that was whole"),
        _counter("collegium_rows_away_seconds_total", "Time in which any rows were with workers"),
        _counter(
            "collegium_rows_blocked_seconds_total", "Of the time that rows were away, that in which nothing went on"
        ),
        _gauge("collegium_overlap_ratio", "Share of the time that rows were away in which the router computed"),
        _counter("collegium_dispatches_total", "Dispatches sent to or taken from links"),
        _counter("collegium_dispatch_retries_total", "Dispatches sent again to another worker"),
        _counter("collegium_link_rows_total", "Rows on links", "direction"),
        _counter("collegium_link_pairs_total", "(row, weight) pairs on links", "direction"),
        _counter("collegium_link_bytes_total", "Bytes on links, headers included", "direction"),
        _counter("collegium_link_late_replies_total", "Replies that came after their deadline"),
        _counter("collegium_prefetch_predicted_total", "Choices of decoding rows foretold one layer ahead"),
        _counter("collegium_prefetch_predicted_right_total", "Foretold choices that the layer then made"),
        _gauge("collegium_links", "Links that are open"),
        _gauge("collegium_placement_epoch", "Epoch of the placement in use"),
        # worker
        _counter("collegium_joined_dispatches_total", "Dispatches that shared their expert calls with another one's"),
        _counter("collegium_join_wait_seconds_total", "Time a worker held dispatches back for those of other routers"),
        _counter("collegium_expert_calls_total", "Expert calls: one expert on all rows that waited for it"),
        _counter("collegium_worker_rows_total", "Rows through experts, one per token and expert"),
        _counter("collegium_expert_requests_total", "Experts that visits of a layer asked the buffer for"),
        _counter("collegium_expert_hits_total", "Expert requests whose weights were resident"),
        _counter("collegium_expert_misses_total", "Expert requests that had to load weights"),
        _counter("collegium_expert_adopted_total", "Misses for experts without a home here"),
        _counter("collegium_expert_evictions_total", "Experts that left their slot for another one"),
        _counter("collegium_expert_streamed_total", "Misses that were computed and not kept"),
        _counter("collegium_expert_load_bytes_total", "Bytes copied into slots, by the tier they came from", "tier"),
        _counter("collegium_expert_load_seconds_total", "Time that loads took, added up over loading threads"),
        _counter("collegium_activated_bytes_total", "Bytes of the experts that were called, at every call"),
        _gauge("collegium_queued_dispatches", "Dispatches that wait to be computed"),
        _counter("collegium_expert_stall_seconds_total", "Computing time that went by waiting for loads"),
        _counter("collegium_prefetch_loads_total", "Loads begun because a router's hint named the expert"),
        _counter("collegium_prefetch_useful_total", "Prefetched experts that were then asked for"),
        _counter("collegium_prefetch_late_total", "Useful prefetches that rows still had to wait for"),
        _counter("collegium_prefetch_wasted_total", "Prefetched experts that nobody asked for in time"),
        _counter("collegium_prefetch_useful_bytes_total", "Bytes of useful prefetches"),
        _counter("collegium_prefetch_wasted_bytes_total", "Bytes of wasted prefetches"),
        _gauge("collegium_prefetch_active", "Whether hints are acted on now"),
        _gauge("collegium_expert_memory_bytes", "Bytes of all slots; 0 without a budget"),
        _gauge("collegium_expert_min_ratio", "Hits over those of Belady's MIN, on a sample of recent visits"),
        _counter("collegium_expired_dispatches_total", "Dispatches dropped because their deadline had passed"),
        _counter("collegium_busy_seconds_total", "Time spent computing experts"),
        _gauge("collegium_resident_bytes", "Bytes of expert weights held"),
        _gauge("collegium_resident_experts", "Experts held"),
        # balancer
        _gauge("collegium_members", "Members under a lease", "role"),
        _counter("collegium_lease_expiries_total", "Leases that lapsed"),
        _counter("collegium_plans_total", "Placements planned"),
        _counter("collegium_store_failures_total", "Redis calls that failed"),
        _gauge("collegium_balancer_is_leader", "Whether this balancer plans and publishes"),
        _gauge("collegium_balancer_has_memory", "Whether this balancer reaches Redis"),
        _gauge(
            "collegium_expert_balancedness",
            "Mean over max of the workers' tokens per layer in the newest window, over layers: least, median, mean",
            "phase",
            "statistic",
        ),
        _counter("collegium_moves_total", "Experts loaded for plans that came into force"),
        _counter("collegium_moved_bytes_total", "Bytes of experts loaded for plans that came into force"),
        _gauge(
            "collegium_seconds_since_plan", "Time since a plan that moved something came into force, or since the start"
        ),
        # every member of a cluster
        _gauge("collegium_seen_epoch", "Newest placement epoch that this process has seen in force"),
        _gauge("collegium_view_age_seconds", "Time since the balancer was last heard of; it speaks every second"),
        # every process
        _histogram("collegium_event_loop_lag_seconds", "How late the event loop ran what was due"),
    )
}

_SERIES = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def series(name: str, **labels: str) -> str:
    """Write the key of one series of a registered name, such as `collegium_link_rows_total{direction="out"}`."""
    expected = METRICS[name].labels
    if tuple(sorted(labels)) != tuple(sorted(expected)):
        raise ValueError(f"{name} has the labels {expected}, not {tuple(labels)}")
    inner = ",".join(f'{label}="{labels[label]}"' for label in expected)
    return f"{name}{{{inner}}}" if inner else name


class MetricsRegistry:
    """The metrics of one process (or, in tests, of one cluster in a process)."""

    def __init__(self) -> None:
        self.prometheus = CollectorRegistry()
        ProcessCollector(registry=self.prometheus)
        self._lock = threading.Lock()
        self._histograms: dict[str, Histogram] = {}
        self._exposed = _Exposed()
        self.prometheus.register(self._exposed)

    def histogram(self, name: str) -> Histogram:
        """Give the distribution of a registered name, made at its first use."""
        with self._lock:
            if name not in self._histograms:
                metric = METRICS[name]
                self._histograms[name] = Histogram(
                    metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.prometheus
                )
            return self._histograms[name]

    def expose(self, counters: Counters) -> Callable[[], None]:
        """Show what a callback returns, by series key, whenever the page is read; the result ends it."""
        self._exposed.callbacks.append(counters)
        return lambda: self._exposed.callbacks.remove(counters)


class _Exposed(Collector):
    def __init__(self) -> None:
        self.callbacks: list[Counters] = []

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        totals: dict[str, float] = {}
        for callback in tuple(self.callbacks):
            for key, value in callback().items():
                totals[key] = totals.get(key, 0.0) + value
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for key, value in totals.items():
            match = _SERIES.fullmatch(key)
            metric = METRICS.get(match[1]) if match else None
            if match is None or metric is None:
                continue  # a counter for status pages only
            if metric.name not in families:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = make(metric.name, metric.help, labels=metric.labels)
            labels = dict(_LABEL.findall(match[2] or ""))
            families[metric.name].add_metric([labels.get(label, "") for label in metric.labels], value)
        return families.values()


_process: MetricsRegistry | None = None
_process_lock = threading.Lock()
_pages: list[tuple[WSGIServer, threading.Thread]] = []


def registry() -> MetricsRegistry:
    """Give this process's registry, made at its first use."""
    global _process
    with _process_lock:
        if _process is None:
            _process = MetricsRegistry()
        return _process


def histogram(name: str) -> Histogram:
    """Give a distribution of this process's registry."""
    return registry().histogram(name)


def expose(counters: Counters) -> Callable[[], None]:
    """Show a service's own counters on this process's page; the result ends it."""
    return registry().expose(counters)


def serve_metrics(bind: str, *, advertise: str = "", setting: str = "--metrics-bind") -> str:
    """Serve this process's page from a daemon thread and give its URL; an empty bind serves nothing and gives "".

    The URL has the bound host, or where that is any, the host of `advertise` or else this one's name.

    Raises FailedPrecondition where the address is in use, SettingsError where it is none.
    """
    if not bind:
        return ""
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{setting}={bind!r} cannot be used: give HOST:PORT")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry().prometheus)
    except OSError as error:
        raise FailedPrecondition(
            f"{setting}={bind} cannot be listened on: {error.strerror or error}",
            reason="ADDRESS_IN_USE",
            field=setting,
            remedy="choose another port, or 0 for any free one",
        ) from error
    _pages.append((server, thread))
    if host in ("0.0.0.0", "[::]", "::"):
        host = advertise.rpartition(":")[0] or socket.gethostname()
    return f"http://{bracketed(host)}:{server.server_port}/metrics"


def stop_metrics() -> None:
    """Stop serving pages; for processes that live on, such as tests."""
    while _pages:
        server, thread = _pages.pop()
        server.shutdown()
        server.server_close()
        thread.join()
