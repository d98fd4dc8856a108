"""What one process counts, and the page that shows it.

Services count in plain numbers of their own and expose them by one callback; only distributions are recorded here
directly. Owns no name: see metric_names.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.fabric.hosts import bracketed
from collegium.fabric.metric_names import LABEL, METRICS, SERIES, VLLM_PREFIX, MetricName, series
from collegium.fabric.metrics_page import MAX_CONNECTIONS, MetricsPage

__all__ = [
    "METRICS",
    "Counters",
    "MetricName",
    "MetricsRegistry",
    "expose",
    "histogram",
    "page",
    "registry",
    "series",
    "serve_metrics",
    "stop_metrics",
]

Counters = Callable[[], Mapping[str, float]]


class MetricsRegistry:
    """The metrics of one process (or, in tests, of one cluster in a process)."""

    def __init__(self) -> None:
        self.prometheus = CollectorRegistry()
        self.model_name = ""  # what vLLM's names are labelled with, once it is known
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
            match = SERIES.fullmatch(key)
            metric = METRICS.get(match[1]) if match else None
            if match is None or metric is None:
                continue  # a counter for status pages only
            if metric.name not in families:
                make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[metric.name] = make(metric.name, metric.help, labels=metric.labels)
            labels = dict(LABEL.findall(match[2] or ""))
            families[metric.name].add_metric([labels.get(label, "") for label in metric.labels], value)
        return families.values()


_VLLM_WORDS = {"cancelled": "abort"}  # values of finished_reason


class _Page(Collector):
    """What is scraped: the registry's metrics without the time at which each was made, under the wanted names."""

    def __init__(self, source: MetricsRegistry, prefix: str) -> None:
        self._source = source
        self._by_name = {metric.name.removesuffix("_total"): metric for metric in METRICS.values() if metric.vllm}
        self._is_renaming = prefix == VLLM_PREFIX.rstrip(":")

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for family in self._source.prometheus.collect():
            known = self._by_name.get(family.name) if self._is_renaming else None
            name = family.name if known is None else VLLM_PREFIX + known.vllm.removesuffix("_total")
            labels = {} if known is None else {"model_name": self._source.model_name, "engine": "0"}
            words = {} if known is None else _VLLM_WORDS
            shown = Metric(name, family.documentation, family.type)
            shown.samples = [
                Sample(
                    name + sample.name.removeprefix(family.name),
                    labels | {label: words.get(value, value) for label, value in sample.labels.items()},
                    sample.value,
                )
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield shown


def page(source: MetricsRegistry, prefix: str = "collegium") -> CollectorRegistry:
    """Give what is scraped of a process. prefix "vllm": those that vLLM has too get its names and labels."""
    shown = CollectorRegistry()
    shown.register(_Page(source, prefix))
    return shown


_process: MetricsRegistry | None = None
_process_lock = threading.Lock()
_pages: list[tuple[MetricsPage, Callable[[], None]]] = []


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


def serve_metrics(
    bind: str,
    *,
    advertise: str = "",
    prefix: str = "collegium",
    max_connections: int = MAX_CONNECTIONS,
    setting: str = "--metrics-bind",
) -> str:
    """Serve this process's page from a daemon thread and give its URL; an empty bind serves nothing and gives "".

    prefix: as for page. max_connections: at once; one more cuts the oldest. The URL has the bound host, or where that
    is any, the host of `advertise` or else this one's name. Raises FailedPrecondition where the address is in use,
    SettingsError where it is none.
    """
    if not bind:
        return ""
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{setting}={bind!r} cannot be used: give HOST:PORT")
    try:
        shown = page(registry(), prefix)
        server = MetricsPage((host.strip("[]"), int(port)), shown, max_connections=max_connections)
    except OSError as error:
        raise FailedPrecondition(
            f"{setting}={bind} cannot be listened on: {error.strerror or error}",
            reason="ADDRESS_IN_USE",
            field=setting,
            remedy="choose another port, or 0 for any free one",
        ) from error
    _pages.append((server, expose(server.counters)))
    if host in ("0.0.0.0", "[::]", "::"):
        host = advertise.rpartition(":")[0] or socket.gethostname()
    return f"http://{bracketed(host)}:{server.server_port}/metrics"


def stop_metrics() -> None:
    """Stop serving pages; for processes that live on, such as tests."""
    while _pages:
        server, conceal = _pages.pop()
        conceal()
        server.end()
