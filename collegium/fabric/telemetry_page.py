"""docs/telemetry.md, written from the registries: every metric, span and attribute, and what becomes of their names.

`python -m collegium.fabric.telemetry_page` prints it; a test holds the committed page against it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from collegium.fabric.metric_names import METRICS, VLLM_PREFIX, MetricName, Role
from collegium.fabric.span_names import SPANS

_SERVICES: Sequence[tuple[Role, str]] = (
    ("gateway", "Gateway"),
    ("router", "Router"),
    ("worker", "Worker"),
    ("balancer", "Balancer"),
    ("member", "Gateways, routers and workers"),
    ("process", "Every process"),
)
_HEAD = """<!-- Written by `make docs` from collegium/fabric/metric_names.py and span_names.py. Do not edit. -->

# Telemetry

Three settings of every service: `--metrics-bind` for the page that Prometheus scrapes, `--otlp-endpoint` (or
`OTEL_EXPORTER_OTLP_ENDPOINT`) for traces and metrics by OTLP over gRPC, `--trace-ratio` for the share of requests
that begin a trace where their caller has not. Logs go to stderr, as text or, with `--log-format json`, as one JSON
object a line.

## One trace

A request is one trace, from the caller's span to the experts. What the caller samples is traced; of requests without
a trace, the share `--trace-ratio` (1 % unless set). Prompts, answers, keys and messages of errors are in no span. A
step that serves several sampled sequences is under the first one's span and linked to the others'.

"""
_AFTER_SPANS = """
Of a sampled sequence every step of its prompt is traced, and one in 64 of its decode steps; one that is traced for
another sequence counts. Where layers times
workers are more than 256, a step traces some of its layers, and others the next time. Attributes of `gen_ai.*` are
on the client's and the gateway's spans alone.

Lines of the log that belong to a request carry `request_id`, and `trace_id` where it has a trace: at the gateway one
line for each request that was let in and ends (`request done`, `request failed`) and what happened on the way
(`replaying`), at the router a sequence that failed. A score has no id, and a call with a wrong key has no line. Find
the trace of a slow request by the `trace_id` of its line, and the lines of a trace by grepping for its id.

## Metrics

Every service shows its own on its page, and sends the same numbers by OTLP every `--otlp-metrics-s` seconds (15
unless set; 0: never). By OTLP the names are those of the page, but for the few in the column "by OTLP", which have
OpenTelemetry's names and dotted attributes.

With `--metrics-prefix vllm` the metrics that vLLM has too are on the page under vLLM's names and labels
(`model_name`, and `engine`, which is always 0), so that dashboards and rules made for vLLM go on working; the others
stay as they are.

No label names a layer, an expert, a worker or a request. What workers do is added up by the balancer that leads
(`collegium_workers_...`), with the least, mean and most over workers where they may differ, so a cluster can be
watched by the pages of gateways, routers and balancers alone, whose number of series does not grow with layers,
experts or workers. `collegium top` and `collegium status --json` show single workers and the hottest experts. A
balancer counts workers' work while it leads: sum rates over balancers.
"""


def render() -> str:
    """Write the page."""
    lines = [_HEAD, "| span | by | under | is | attributes |\n", "|---|---|---|---|---|\n"]
    for span in SPANS:
        attributes = ", ".join(f"`{name}`" for name in span.attributes)
        lines.append(f"| `{span.name}` | {span.by} | {span.under} | {span.help} | {attributes} |\n")
    lines.append(_AFTER_SPANS)
    for role, title in _SERVICES:
        metrics = [metric for metric in METRICS.values() if metric.role == role]
        lines += [f"\n### {title}\n\n", *_table(metrics)]
    lines.append(
        "\nOf the process itself come `process_cpu_seconds_total`, `process_resident_memory_bytes`, "
        "`process_virtual_memory_bytes`,\n`process_start_time_seconds`, `process_open_fds` and `process_max_fds`, "
        "as Prometheus' own library has them.\n"
    )
    lines.append(
        "\n### The SDK\n\nOn the meter provider that the caller's process has set up, if any: "
        "`gen_ai.client.operation.duration` (seconds)\n"
        "and `gen_ai.client.token.usage` (tokens, by `gen_ai.token.type`).\n"
    )
    return "".join(lines)


def _table(metrics: Sequence[MetricName]) -> Iterable[str]:
    has_vllm = any(metric.vllm for metric in metrics)
    has_otlp = any(metric.otlp for metric in metrics)
    head = ["name", "kind", "labels", "is", *(["vLLM's name"] * has_vllm), *(["by OTLP"] * has_otlp)]
    yield f"| {' | '.join(head)} |\n"
    yield f"|{'---|' * len(head)}\n"
    for metric in metrics:
        cells = [f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help]
        if has_vllm:
            cells.append(f"`{VLLM_PREFIX}{metric.vllm}`" if metric.vllm else "")
        if has_otlp:
            cells.append(f"`{metric.otlp}`" if metric.otlp else "")
        yield f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
