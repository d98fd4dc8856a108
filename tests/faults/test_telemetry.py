"""What a cluster of real processes tells of itself, its traces, metrics and logs, and what it keeps to itself.

One cluster, asked by a caller of its own that traces everything, with canaries in prompts, stop strings, keys and
passwords. A router and Redis are killed on the way.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from prometheus_client.parser import text_string_to_metric_families

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.fabric.metric_names import METRICS
from collegium.fabric.span_names import SPANS
from collegium.model.manifest import ensure_manifest
from tests.checkpoints import Variant
from tests.collector import Collector, Received, listening, named
from tests.oracle import Oracle
from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
KEY, WRONG_KEY, PASSWORD = "canary-key-3141", "canary-wrong-key-59", "canary-password-26"
PROMPT, CHAT, STOP, ODD = "canary prompt 535", "canary chat 897", "canary stop 932", "canary id 384"
CALLER = """
import sys, threading
from opentelemetry import metrics
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from collegium.client import Client, Message
from collegium.fabric import tracing
from collegium.fabric.errors import CollegiumError

what, endpoint, target, key, wrong_key, prompt, chat, stop, odd = sys.argv[1:]
resource = Resource.create({"service.name": "caller"})
exporter = OTLPMetricExporter(endpoint=endpoint, insecure=True)
metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(exporter)], resource))
tracing.setup_tracing(resource, endpoint, 1.0)

def at_once(*names):
    # Two sampled sequences in one step.
    calls = [
        threading.Thread(
            target=client.complete, args=(prompt,), kwargs=dict(max_tokens=24, ignore_eos=True, request_id=name)
        )
        for name in names
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()

def refused(call):
    try:
        call()
    except CollegiumError as error:
        return
    raise SystemExit("a wrong request was served")

with Client(target, api_key=key) as client:
    if what == "pair":
        at_once("left", "right")
    elif what == "survivor":
        client.complete(prompt, max_tokens=40, ignore_eos=True, request_id="survivor")
    else:
        client.complete(prompt, max_tokens=140, ignore_eos=True, request_id="plain")
        client.complete(messages=[Message(role="user", content=chat)], max_tokens=4, stop=[stop], request_id="chat")
        client.complete(prompt_ids=[9, 10], max_tokens=3, n=2, seed=5, temperature=0.5, request_id="two")
        client.score(prompt)
        refused(lambda: client.complete(prompt, max_tokens=4, stop=[stop] * 100, request_id="refused"))
        refused(lambda: client.complete(prompt, model="another"))
        refused(lambda: client.complete(prompt, request_id=odd + "\\n"))
        refused(lambda: client.complete(prompt * 4000, max_tokens=4))
if what == "all":
    with Client(target, api_key=wrong_key) as client:
        refused(lambda: client.complete(prompt, max_tokens=4))
metrics.get_meter_provider().shutdown()
tracing.shutdown_tracing()
"""
NUM_PROMPT = 17  # tokens of PROMPT, a byte each
SHARE_OF_WORK = METRICS["collegium_workers_busy_ratio"].otlp_name
DONE = {"plain", "chat", "two", "left", "right", "survivor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Everything that came out of the cluster."""

    collector: Collector
    logs: list[tuple[str, str]]  # (member, line)
    pages: dict[str, str]  # by service

    @property
    def spans(self) -> list[Received]:
        return self.collector.received

    def lines(self, event: str) -> list[dict[str, str]]:
        found = [json.loads(line) for _, line in self.logs if line.startswith("{")]
        return [line for line in found if line["event"] == event]


def caller(what: str, endpoint: str, cluster: Cluster) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CALLER, what, endpoint, cluster.targets[0]]
    return subprocess.Popen([*command, KEY, WRONG_KEY, PROMPT, CHAT, STOP, ODD], cwd=ROOT, text=True)


def wait_for_end(cluster: Cluster, asking: subprocess.Popen[str]) -> None:
    try:
        cluster.wait_until(lambda: asking.poll() is not None, 120, "the caller's end")
        assert asking.returncode == 0
    finally:
        asking.kill()
        asking.wait()


def pages_of(cluster: Cluster, client: Client) -> dict[str, str]:
    pages: dict[str, str] = {}
    for member in client.get_cluster().members:
        if member.metrics_url:
            with suppress(OSError), urllib.request.urlopen(member.metrics_url, timeout=30) as response:  # one is dead
                pages[member.role] = response.read().decode()
    return pages


@pytest.fixture(scope="module")
def told(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder = tmp_path_factory.mktemp("telemetry")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    checkpoint = oracle.checkpoint("mixtral", Variant.TEXT)
    redis = RedisServer(folder, password=PASSWORD)
    redis.start()
    logs: list[tuple[str, str]] = []
    with listening() as (collector, endpoint):
        spec = ClusterSpec(
            model=checkpoint,
            manifest=ensure_manifest(checkpoint, out=folder / "manifest.json"),
            num_workers=2,
            redis_url=redis.url,
            log_level="debug",
            log_format="json",
            flags={"gateway": ("--api-keys", str(keys)), "balancer": ("--metrics-bind", "127.0.0.1:0")},
            env={
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "COLLEGIUM_TRACE_RATIO": "0",
                "COLLEGIUM_OTLP_METRICS_S": "0.5",
            },
        )
        with Cluster(spec, relay=lambda name, line: logs.append((name, line))) as cluster:
            wait_for_end(cluster, caller("all", endpoint, cluster))
            with Client(cluster.targets, api_key=KEY) as client:
                pair = ask_while_the_router_stands_still(
                    cluster, client, lambda: caller("pair", endpoint, cluster), num_requests=2
                )
                cluster.kill("router-0", signal.SIGCONT)
                wait_for_end(cluster, pair)
                # What a process that is killed has not sent yet is lost.
                cluster.wait_until(lambda: {"left", "right"} <= sequences_told(collector), 60, "the router's spans")
                lose_the_router_of(cluster, client, lambda: caller("survivor", endpoint, cluster))
                redis.kill()
                told = Told(collector=collector, logs=logs, pages={})
                cluster.wait_until(lambda: bool(told.lines("Redis is away; going on from memory")), 60)
                redis.start()
                cluster.wait_until(lambda: bool(told.lines("Redis is back")), 60)
                told.pages.update(pages_of(cluster, client))
                # Shares are of 5 seconds of work: what goes before may be quicker.
                cluster.wait_until(lambda: SHARE_OF_WORK in collector.metrics.get("collegium-balancer", ()), 60)
        yield told


def lose_the_router_of(cluster: Cluster, client: Client, ask: Callable[[], subprocess.Popen[str]]) -> None:
    """Have a request's router die with it: it is stopped first, so that it is sure to be there."""
    asking = ask_while_the_router_stands_still(cluster, client, ask)
    cluster.kill("router-0")
    wait_for_end(cluster, asking)


def sequences_told(collector: Collector) -> set[str]:
    """Requests whose sequences the collector has heard of from their router, to the end."""
    sequences = [one.span for one in list(collector.received) if one.span.name == "router.sequence"]
    return {named(span.attributes)["collegium.request_id"].partition("/")[0] for span in sequences}


def ask_while_the_router_stands_still(
    cluster: Cluster, client: Client, ask: Callable[[], subprocess.Popen[str]], num_requests: int = 1
) -> subprocess.Popen[str]:
    """Stop the router's process and let requests come; gives who asks."""
    (gateway,) = [member for member in client.get_cluster().members if member.role == "gateway"]

    def num_admitted() -> float:
        with urllib.request.urlopen(gateway.metrics_url, timeout=30) as response:
            page = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
        return page["collegium_prompt_tokens"].samples[0].value / NUM_PROMPT

    before = num_admitted()
    cluster.kill("router-0", signal.SIGSTOP)
    asking = ask()
    cluster.wait_until(lambda: num_admitted() >= before + num_requests, 60, "the requests' admission")
    return asking


def traces(told: Told) -> dict[str, list[Received]]:
    by_trace: defaultdict[str, list[Received]] = defaultdict(list)
    for one in told.spans:
        by_trace[one.span.trace_id.hex()].append(one)
    return by_trace


def of_request(told: Told, request_id: str) -> list[Received]:
    """The trace of a request."""
    for spans in traces(told).values():
        if any(named(one.span.attributes).get("gen_ai.response.id") == request_id for one in spans):
            return spans
    raise AssertionError(f"no trace of {request_id}")


def test_every_trace_has_one_root_and_no_orphan(told: Told) -> None:
    assert len(traces(told)) > 8
    for spans in traces(told).values():
        ids = {one.span.span_id for one in spans}
        roots = [one for one in spans if not one.span.parent_span_id]
        assert [one.service for one in roots] == ["caller"]
        assert all(one.span.parent_span_id in ids for one in spans if one.span.parent_span_id)


def test_a_request_is_followed_from_the_caller_to_each_worker_and_layer(told: Told) -> None:
    spans = of_request(told, "plain")
    by_id = {one.span.span_id: one for one in spans}
    paths: set[tuple[tuple[str, str], ...]] = set()
    for one in spans:
        path, at = [(one.service.removeprefix("collegium-"), one.span.name)], one
        while at.span.parent_span_id:
            at = by_id[at.span.parent_span_id]
            path.append((at.service.removeprefix("collegium-"), at.span.name))
        paths.add(tuple(reversed(path)))
    assert max(paths, key=len) == (
        ("caller", "text_completion"),
        ("gateway", "collegium.v1.Inference/Generate"),
        ("router", "router.sequence"),
        ("router", "router.step"),
        ("router", "router.experts"),
        ("worker", "worker.batch"),
    )
    assert len(paths) == 6, "and nothing beside it"
    steps = [one.span for one in spans if one.span.name == "router.step"]
    assert {named(span.attributes)["collegium.kind"] for span in steps} == {"prefill", "decode"}
    assert len(steps) == 1 + 2, "the prompt, and of 139 decode steps those after 64 and 128 tokens"
    for step in steps:
        layers = [one.span for one in spans if one.span.parent_span_id == step.span_id]
        assert [named(span.attributes)["collegium.layer"] for span in layers] == ["0", "1", "2"]
        for layer in layers:
            batches = [one.span for one in spans if one.span.parent_span_id == layer.span_id]
            assert batches and {named(b.attributes)["collegium.layer"] for b in batches} == {
                named(layer.attributes)["collegium.layer"]
            }
            assert layer.start_time_unix_nano >= step.start_time_unix_nano
            assert layer.end_time_unix_nano <= step.end_time_unix_nano


def test_a_step_of_two_requests_is_under_one_and_linked_to_the_other(told: Told) -> None:
    left, right = of_request(told, "left"), of_request(told, "right")
    sequences = {one.span.span_id: one.span.trace_id for one in left + right if one.span.name == "router.sequence"}
    steps = [one.span for one in left + right if one.span.name == "router.step"]
    linked = [(step.trace_id, sequences[link.span_id]) for step in steps for link in step.links]
    shared = [step for step in steps if int(named(step.attributes)["collegium.sequences"]) > 1]
    assert shared and all(len(step.links) == 1 for step in shared)
    assert all(one != other for one, other in linked)


def test_every_span_and_attribute_is_documented_and_gen_ai_is_the_clients_and_the_gateways(told: Told) -> None:
    documented = {name: set(span.attributes) for span in SPANS for name in span.name.split(", ")}
    seen: set[str] = set()
    for one in told.spans:
        name, service = one.span.name, one.service.removeprefix("collegium-")
        attributes = set(named(one.span.attributes))
        if name.startswith("collegium.v1."):
            name = "collegium.v1." + ("Inference/METHOD" if service == "caller" else "SERVICE/METHOD")
        elif service == "caller":
            name = f"{name.split()[0]} MODEL"
        seen.add(name)
        assert attributes <= documented[name], one.span.name
        has_gen_ai = any(attribute.startswith("gen_ai.") for attribute in attributes)
        assert not has_gen_ai or service in ("caller", "gateway")
    assert seen == set(documented)


def test_generate_spans_have_what_the_conventions_ask_for(told: Told) -> None:
    for request_id, prompt, output, operation in (("plain", None, 140, "text_completion"), ("two", 2, 6, None)):
        for one in of_request(told, request_id):
            attributes = named(one.span.attributes)
            if "gen_ai.response.id" not in attributes:
                continue
            assert attributes["gen_ai.provider.name"] == "collegium"
            assert attributes["gen_ai.operation.name"] == (operation or "text_completion")
            assert attributes["gen_ai.usage.output_tokens"] == str(output)
            assert prompt is None or attributes["gen_ai.usage.input_tokens"] == str(prompt)
            assert attributes["gen_ai.response.model"]
    chat = [one for one in of_request(told, "chat") if "gen_ai.response.id" in named(one.span.attributes)]
    assert {named(one.span.attributes)["gen_ai.operation.name"] for one in chat} == {"chat"}
    assert len(chat) == 2, "the caller's and the gateway's"


def test_what_failed_says_why_without_what_was_asked(told: Told) -> None:
    refused = [one for one in of_request(told, "refused") if one.span.status.code == Status.STATUS_CODE_ERROR]
    assert {one.service for one in refused} == {"caller", "collegium-gateway"}
    assert {one.span.status.message for one in refused} == {
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT stopping.stop_strings",
    }
    assert {named(one.span.attributes)["error.type"] for one in refused} == {"INVALID_ARGUMENT"}


def test_a_request_that_lost_its_router_is_one_trace_all_the_same(told: Told) -> None:
    spans = of_request(told, "survivor")
    gateway = [one.span for one in spans if one.service == "collegium-gateway"]
    assert len(gateway) == 1
    (replayed,) = told.lines("replaying")
    assert replayed["request_id"] == "survivor"
    assert replayed["trace_id"] == gateway[0].trace_id.hex()
    assert [one.span.parent_span_id for one in spans if one.span.name == "router.sequence"] == [gateway[0].span_id]


def test_every_service_keeps_what_stands_from_the_garbage_collector(told: Told) -> None:
    # A full collection would stop it for a quarter of a second. There are two of the router: one was killed.
    frozen = [name for name, line in told.logs if '"event": "frozen"' in line or '"event":"frozen"' in line]
    assert sorted(frozen) == ["balancer", "gateway-0", "router-0", "router-0", "worker-0", "worker-1"]


def test_lines_of_a_request_carry_its_id_and_its_trace(told: Told) -> None:
    done = {line["request_id"]: line for line in told.lines("request done") if "request_id" in line}
    assert set(done) >= DONE
    for request_id in DONE:
        assert done[request_id]["trace_id"] == of_request(told, request_id)[0].span.trace_id.hex()
    assert done["plain"]["output_tokens"] == 140
    assert {"prompt_tokens", "first_token_s", "took_s", "finish", "operation"} <= set(done["plain"])
    failed = told.lines("request failed")
    assert {line["code"] for line in failed} == {"INVALID_ARGUMENT", "NOT_FOUND"}
    assert all(line["trace_id"] and line["reason"] for line in failed)
    assert [line["field"] for line in failed if line.get("request_id") == "refused"] == ["stopping.stop_strings"]
    assert len([line for line in failed if "request_id" not in line]) == 1, "the one whose id was no id"


def test_nothing_is_said_to_be_lost_on_the_way_to_the_collector(told: Told) -> None:
    # The last sending of a process is when its parts have been taken down already.
    assert not told.lines("metrics cannot be sent; trying on, and serving is not affected")


def test_every_line_is_one_json_object_with_the_same_head(told: Told) -> None:
    ours = [(name, line) for name, line in told.logs if line.strip()]
    assert len(ours) > 30
    for name, line in ours:
        read = json.loads(line)
        assert list(read)[:5] == ["time", "level", "service", "logger", "event"], (name, line)
        assert read["service"] == name.partition("-")[0]


def test_no_prompt_and_no_secret_is_in_logs_spans_or_metrics(told: Told) -> None:
    spans = [one.span.SerializeToString() for one in told.spans if one.service != "caller"]
    own_spans = [one.span.SerializeToString() for one in told.spans if one.service == "caller"]
    metrics = [metric.SerializeToString() for by_name in told.collector.metrics.values() for metric in by_name.values()]
    lines = [line.encode() for _, line in told.logs]
    pages = [page.encode() for page in told.pages.values()]
    for told_there in (spans, metrics, lines, pages):
        assert told_there
        assert not [one for one in told_there if b"canary" in one]
    for secret in (PROMPT, CHAT, STOP, KEY, WRONG_KEY):  # what a caller named its request is its own
        assert not [one for one in own_spans if secret.encode() in one], secret


def shown(page: str) -> set[str]:
    """The registered names on a page."""
    return {
        family.name + ("_total" if family.type == "counter" else "") for family in text_string_to_metric_families(page)
    }


# What needs more than this cluster did: a name, and when it is there.
RARE = {
    "collegium_expert_min_ratio": "with a budget of expert memory",
    "collegium_workers_hit_ratio": "once 5 seconds of work were seen",
    "collegium_expert_balancedness": "once a window of load was closed",
    "collegium_submissions_refused_total": "once a gateway has sent what no gateway should",
}


def test_metrics_are_the_documented_ones_on_the_page_and_by_otlp(told: Told) -> None:
    assert set(told.pages) == {"gateway", "router", "worker"}, "the balancer's page is not in its own status"
    for role in ("gateway", "router", "worker", "balancer"):
        wanted = {
            metric.name: metric
            for metric in METRICS.values()
            if metric.role in (role, "process") or (metric.role == "member" and role != "balancer")
        }
        sent = told.collector.metrics[f"collegium-{role}"]
        by_otlp = {name for name in sent if not name.startswith("process_")}
        assert by_otlp <= {metric.otlp_name for metric in wanted.values()}
        missing = {name for name, metric in wanted.items() if metric.otlp_name not in by_otlp} - set(RARE)
        assert not missing, (role, missing)
        if role != "balancer":
            on_page = {name for name in shown(told.pages[role]) if not name.startswith("process_")}
            assert on_page - set(RARE) == set(wanted) - set(RARE)
    assert {"gen_ai.client.operation.duration", "gen_ai.client.token.usage"} <= set(told.collector.metrics["caller"])


def test_counts_by_otlp_are_what_was_asked(told: Told) -> None:
    gateway = told.collector.metrics["collegium-gateway"]
    duration = gateway["gen_ai.server.request.duration"].histogram.data_points
    by_operation: defaultdict[tuple[str, str], int] = defaultdict(int)
    for point in duration:
        labels = named(point.attributes)
        by_operation[labels["gen_ai.operation.name"], labels.get("error.type", "")] += point.count
    assert by_operation["chat", ""] == 1
    assert by_operation["text_completion", ""] == 5
    assert by_operation["text_completion", "caller"] == 4
    assert len(by_operation) == 3
    (tokens,) = gateway["collegium_generation_tokens_total"].sum.data_points
    assert tokens.as_double == 140 + 4 + 6 + 24 + 24 + 40
