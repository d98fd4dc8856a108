"""The one registry of names: every metric that any service shows, what it means, and who shows it.

Owns names, kinds, units, labels, buckets, and which of vLLM's or OpenTelemetry's names means the same. Each name is
shown by one role, or is of every process: what two services count is never added up under one name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["gateway", "router", "worker", "balancer", "member", "process"]
PREFIX = "collegium_"
VLLM_PREFIX = "vllm:"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LAG_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)
# Boundaries that OpenTelemetry's conventions for generative AI advise.
REQUEST_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricName:
    """What a metric is called, what kind it is, what it means, who shows it, and its labels.

    role: "member" is every member of a cluster but balancers, "process" every process. vllm: its name without prefix
    where vLLM has the same thing. otlp: its name by OTLP where that is another one.
    """

    name: str
    kind: Kind
    role: Role
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    vllm: str = ""
    otlp: str = ""

    @property
    def unit(self) -> str:
        """What it is measured in, by its name; empty for plain numbers."""
        stem = self.name.removesuffix("_total")
        return next((unit for unit in ("seconds", "bytes", "ratio", "tokens") if stem.endswith(f"_{unit}")), "")

    @property
    def otlp_name(self) -> str:
        """Its name by OTLP."""
        return self.otlp or self.name

    @property
    def otlp_labels(self) -> tuple[str, ...]:
        """Its attributes by OTLP, in the order of its labels."""
        return tuple(_ATTRIBUTES.get(label, label) for label in self.labels)


_ATTRIBUTES = {
    "gen_ai_operation_name": "gen_ai.operation.name",
    "gen_ai_provider_name": "gen_ai.provider.name",
    "gen_ai_request_model": "gen_ai.request.model",
    "error_type": "error.type",
}
_GEN_AI = tuple(_ATTRIBUTES)[:3]


def _counter(role: Role, name: str, help: str, *labels: str, vllm: bool = False) -> MetricName:
    return _metric("counter", role, name, help, labels, vllm=vllm)


def _gauge(role: Role, name: str, help: str, *labels: str, vllm: bool = False) -> MetricName:
    return _metric("gauge", role, name, help, labels, vllm=vllm)


def _histogram(
    role: Role, name: str, help: str, *, buckets: tuple[float, ...] = _SECONDS, vllm: bool = False
) -> MetricName:
    return _metric("histogram", role, name, help, (), buckets=buckets, vllm=vllm)


def _metric(
    kind: Kind,
    role: Role,
    name: str,
    help: str,
    labels: tuple[str, ...],
    *,
    buckets: tuple[float, ...] = (),
    vllm: bool,
) -> MetricName:
    return MetricName(
        name=PREFIX + name,
        kind=kind,
        role=role,
        help=help,
        labels=labels,
        buckets=buckets,
        vllm=name if vllm else "",
    )


def _gen_ai(name: str, otlp: str, help: str, buckets: tuple[float, ...], *labels: str) -> MetricName:
    return MetricName(
        name=name, kind="histogram", role="gateway", help=help, labels=_GEN_AI + labels, buckets=buckets, otlp=otlp
    )


_GATEWAY = (
    _counter("gateway", "request_success_total", "Choices that ended well, by why", "finished_reason", vllm=True),
    _counter("gateway", "request_failure_total", "Requests that failed, by canonical status", "code"),
    _counter("gateway", "requests_shed_total", "Requests that admission refused"),
    _counter("gateway", "texts_refused_total", "Prompts whose rendering or tokenising took too much time or memory"),
    _gauge("gateway", "running_sequences", "Choices of the requests inside"),
    _counter("gateway", "requests_replayed_total", "Requests replayed on a router after another one was lost"),
    _counter("gateway", "prompt_tokens_total", "Prompt tokens accepted", vllm=True),
    _counter("gateway", "generation_tokens_total", "Tokens generated", vllm=True),
    _gauge("gateway", "queued_tokens", "Tokens admitted and not yet generated or computed"),
    _gauge("gateway", "routers_attached", "Routers that this gateway has a stream to"),
    _histogram("gateway", "time_to_first_token_seconds", "From a request's arrival to its first token", vllm=True),
    _histogram("gateway", "inter_token_latency_seconds", "Between one token of a request and the next", vllm=True),
    _histogram("gateway", "e2e_request_latency_seconds", "From a request's arrival to its end", vllm=True),
    _histogram("gateway", "request_prompt_tokens", "Prompt tokens of a request", buckets=_TOKENS, vllm=True),
    _histogram("gateway", "request_generation_tokens", "Tokens generated for a request", buckets=_TOKENS, vllm=True),
    _gen_ai(
        "gen_ai_server_request_duration_seconds",
        "gen_ai.server.request.duration",
        "From a request's arrival to its end; error_type: empty, `caller` or `server`, by whose fault it failed",
        REQUEST_SECONDS,
        "error_type",
    ),
    _gen_ai(
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai.server.time_to_first_token",
        "From a request's arrival to its first token, of those that ended well",
        _FIRST_TOKEN_SECONDS,
    ),
    _gen_ai(
        "gen_ai_server_time_per_output_token_seconds",
        "gen_ai.server.time_per_output_token",
        "Time per token after the first one, of the longest choice of a request that ended well",
        _TOKEN_SECONDS,
    ),
)

_ROUTER = (
    _gauge("router", "num_requests_running", "Sequences being grown", vllm=True),
    _gauge("router", "num_requests_waiting", "Sequences that wait for KV blocks or their turn", vllm=True),
    _gauge("router", "kv_cache_usage_perc", "Share of KV blocks in use, in [0, 1]", vllm=True),
    _counter("router", "num_preemptions_total", "Sequences preempted to free KV blocks", vllm=True),
    _counter("router", "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache", vllm=True),
    _counter("router", "prefix_cache_hits_total", "Prompt tokens found in the prefix cache", vllm=True),
    _histogram(
        "router", "request_queue_time_seconds", "From a sequence's arrival at its router to its first step", vllm=True
    ),
    _histogram("router", "request_prefill_time_seconds", "From a sequence's first step to its first token", vllm=True),
    _histogram(
        "router",
        "request_decode_time_seconds",
        "From a sequence's first token to its last one, failures left out",
        vllm=True,
    ),
    _counter(
        "router", "submissions_refused_total", "Submissions, streams and traces refused as wrong or too many", "reason"
    ),
    _counter("router", "prefilled_tokens_total", "Prompt tokens computed"),
    _counter("router", "sampled_tokens_total", "Tokens drawn, replays included"),
    _counter("router", "steps_total", "Steps by the kinds of rows that they held", "kind"),
    _counter("router", "step_seconds_total", "Time spent in steps"),
    _counter("router", "forward_seconds_total", "Of the time in steps, that of forward passes, waits included"),
    _counter("router", "steps_shortened_total", "Steps that had fewer prompt rows as several callers are served"),
    _counter("router", "micro_batches_total", "Parts into which steps were split, one for a step that was whole"),
    _counter("router", "rows_away_seconds_total", "Time in which any rows were with workers"),
    _counter("router", "rows_blocked_seconds_total", "Of the time that rows were away, that in which nothing went on"),
    _gauge("router", "overlap_ratio", "Share of the time that rows were away in which the router computed"),
    _counter("router", "exchanges_total", "Exchanges of a layer with its workers, by what carried them", "way"),
    _counter("router", "dispatches_total", "Dispatches sent"),
    _counter("router", "dispatch_retries_total", "Dispatches sent again to another worker"),
    _counter("router", "suspect_answers_total", "Workers' answers whose rows were no numbers, to rows that were"),
    _counter("router", "link_rows_total", "Rows on links", "direction"),
    _counter("router", "link_pairs_total", "(row, weight) pairs on links", "direction"),
    _counter("router", "link_bytes_total", "Bytes on links, headers included", "direction"),
    _counter("router", "link_late_replies_total", "Replies that came after their deadline"),
    _counter("router", "prefetch_predicted_total", "Choices of decoding rows foretold one layer ahead"),
    _counter("router", "prefetch_predicted_right_total", "Foretold choices that the layer then made"),
    _gauge("router", "links", "Links that are open"),
    _gauge("router", "placement_epoch", "Epoch of the placement that this router uses"),
)

_WORKER = (
    _counter("worker", "worker_dispatches_total", "Dispatches answered"),
    _counter("worker", "answers_total", "Dispatches answered, failed ones too, by what answered", "way"),
    _counter("worker", "joined_dispatches_total", "Dispatches that shared their expert calls with another one's"),
    _counter("worker", "join_wait_seconds_total", "Time a worker held dispatches back for those of other routers"),
    _counter("worker", "expert_calls_total", "Expert calls: one expert on all rows that waited for it"),
    _counter("worker", "worker_rows_total", "Rows through experts, one per token and expert"),
    _counter("worker", "expert_requests_total", "Experts that visits of a layer asked the buffer for"),
    _counter("worker", "expert_hits_total", "Expert requests whose weights were resident"),
    _counter("worker", "expert_misses_total", "Expert requests that had to load weights"),
    _counter("worker", "expert_adopted_total", "Misses for experts without a home here"),
    _counter("worker", "expert_evictions_total", "Experts that left their slot for another one"),
    _counter("worker", "expert_streamed_total", "Misses that were computed and not kept"),
    _counter("worker", "expert_load_bytes_total", "Bytes copied into slots, by the tier they came from", "tier"),
    _counter("worker", "expert_load_seconds_total", "Time that loads took, added up over loading threads"),
    _counter("worker", "activated_bytes_total", "Bytes of the experts that were called, at every call"),
    _counter("worker", "expert_stall_seconds_total", "Computing time that went by waiting for loads"),
    _counter("worker", "prefetch_loads_total", "Loads begun because a router's hint named the expert"),
    _counter("worker", "prefetch_useful_total", "Prefetched experts that were then asked for"),
    _counter("worker", "prefetch_late_total", "Useful prefetches that rows still had to wait for"),
    _counter("worker", "prefetch_wasted_total", "Prefetched experts that nobody asked for in time"),
    _counter("worker", "prefetch_useful_bytes_total", "Bytes of useful prefetches"),
    _counter("worker", "prefetch_wasted_bytes_total", "Bytes of wasted prefetches"),
    _counter("worker", "expired_dispatches_total", "Dispatches dropped because their deadline had passed"),
    _counter("worker", "busy_seconds_total", "Time spent computing experts"),
    _counter("worker", "worker_link_rows_total", "Rows on links", "direction"),
    _counter("worker", "worker_link_bytes_total", "Bytes on links, headers included", "direction"),
    _gauge("worker", "queued_dispatches", "Dispatches that wait to be computed"),
    _gauge("worker", "prefetch_active", "Whether hints are acted on now"),
    _gauge("worker", "expert_memory_bytes", "Bytes of all slots; 0 without a budget"),
    _gauge("worker", "expert_min_ratio", "Hits over those of Belady's MIN, on a sample of recent visits"),
    _gauge("worker", "resident_bytes", "Bytes of expert weights held"),
    _gauge("worker", "resident_experts", "Experts held"),
    _gauge("worker", "worker_links", "Links that are open"),
    _counter("worker", "link_pauses_total", "Times that a link was not read, since dispatches took --link-memory"),
)

_NOT_SUMMED = ("prefetch_active", "expert_min_ratio")

_BALANCER = (
    _gauge("balancer", "members", "Members under a lease", "role"),
    _counter("balancer", "lease_expiries_total", "Leases that lapsed"),
    _counter("balancer", "plans_total", "Placements planned"),
    _counter("balancer", "store_failures_total", "Redis calls that failed"),
    _counter("balancer", "scalings_refused_total", "Requests to scale that were refused, being above --max-workers"),
    _counter("balancer", "joins_refused_total", "Leases that were refused, there being --max-members of them"),
    _gauge("balancer", "balancer_is_leader", "Whether this balancer plans and publishes"),
    _gauge("balancer", "balancer_has_memory", "Whether this balancer reaches Redis"),
    _gauge("balancer", "published_epoch", "Epoch of the placement in force"),
    _gauge(
        "balancer",
        "expert_balancedness",
        "Mean over max of the workers' tokens per layer in the newest window, over layers: least, median, mean",
        "phase",
        "statistic",
    ),
    _counter("balancer", "moves_total", "Experts loaded for plans that came into force"),
    _counter("balancer", "moved_bytes_total", "Bytes of experts loaded for plans that came into force"),
    _gauge(
        "balancer",
        "seconds_since_plan",
        "Time since a plan that moved something came into force, or since the start",
    ),
    _gauge(
        "balancer",
        "workers_busy_ratio",
        "Share of the newest interval that workers spent computing, over workers: least, mean, most",
        "statistic",
    ),
    _gauge(
        "balancer",
        "workers_hit_ratio",
        "Expert hits over requests in the newest interval, over workers: least, mean, most",
        "statistic",
    ),
)

_MEMBER = (
    _gauge("member", "seen_epoch", "Newest placement epoch that this process has seen in force"),
    _gauge("member", "view_age_seconds", "Time since the balancer was last heard of; it speaks every second"),
)

_PROCESS = (
    _counter(
        "process", "metrics_page_cuts_total", "Connections to the metrics page that were cut: too slow, or too many"
    ),
    _counter("process", "loop_faults_total", "Turns of a background loop that failed and are tried again"),
    _histogram("process", "event_loop_lag_seconds", "How late the event loop ran what was due", buckets=_LAG_SECONDS),
)


def workers_name(name: str) -> str:
    """Give the name under which the leading balancer adds up a worker's metric over all workers."""
    stem = name.removeprefix(PREFIX).removeprefix("worker_")
    return f"{PREFIX}workers_{stem}"


def _summed() -> Iterator[MetricName]:
    for metric in _WORKER:
        if metric.name.removeprefix(PREFIX) not in _NOT_SUMMED:
            yield MetricName(
                name=workers_name(metric.name),
                kind=metric.kind,
                role="balancer",
                help=f"All workers: {metric.help[0].lower()}{metric.help[1:]}",
                labels=metric.labels,
            )


SUMMED: dict[str, str] = {
    metric.name: workers_name(metric.name) for metric in _WORKER if metric.name.removeprefix(PREFIX) not in _NOT_SUMMED
}
METRICS: dict[str, MetricName] = {
    metric.name: metric for metric in (*_GATEWAY, *_ROUTER, *_WORKER, *_BALANCER, *_summed(), *_MEMBER, *_PROCESS)
}

SERIES = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?")
LABEL = re.compile(r'(\w+)="([^"]*)"')


def series(name: str, **labels: str) -> str:
    """Write the key of one series of a registered name, such as `collegium_link_rows_total{direction="out"}`."""
    expected = METRICS[name].labels
    if tuple(sorted(labels)) != tuple(sorted(expected)):
        raise ValueError(f"{name} has the labels {expected}, not {tuple(labels)}")
    inner = ",".join(f'{label}="{labels[label]}"' for label in expected)
    return f"{name}{{{inner}}}" if inner else name
