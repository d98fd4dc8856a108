"""One trace from the caller's span through gateway and router step to the worker's batch, over real processes."""

import subprocess
import sys
from pathlib import Path

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.model.manifest import ensure_manifest
from tests.collector import Collector
from tests.oracle import Oracle

ROOT = Path(__file__).parents[2]
CALLER = """
import sys
from collegium.client import Client
from collegium.fabric import telemetry

telemetry.setup_tracing("caller", sys.argv[1], 1.0)
with Client(sys.argv[2]) as client:
    client.complete(prompt_ids=[9, 10, 11], max_tokens=4, ignore_eos=True)
telemetry.shutdown_tracing()
"""


def test_a_sampled_request_is_one_trace_down_to_the_experts(
    oracle: Oracle,
    tmp_path: Path,
    collector: tuple[Collector, str],
) -> None:
    received, endpoint = collector
    checkpoint = oracle.checkpoint("mixtral")
    spec = ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path / "manifest.json"),
        num_workers=1,
        log_level="warning",
        can_restart=False,
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "COLLEGIUM_TRACE_RATIO": "0"},
    )
    with Cluster(spec) as cluster:
        subprocess.run([sys.executable, "-c", CALLER, endpoint, cluster.targets[0]], cwd=ROOT, check=True, timeout=60)
    spans = received.spans
    path: list[Span] = [spans["worker.batch"]]
    by_id = {span.span_id: span for span in spans.values()}
    while path[-1].parent_span_id:
        path.append(by_id[path[-1].parent_span_id])
    names = [span.name for span in path]
    assert names[1] == "router.step"
    assert len(names) >= 4  # the gateway's and the caller's follow
    assert len({span.trace_id for span in path}) == 1
    assert {"caller", "collegium-gateway", "collegium-router", "collegium-worker"} <= received.services
