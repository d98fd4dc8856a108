"""Traces by OTLP: what a process exports, to a real collector of fifteen lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.collector import Collector

ROOT = Path(__file__).parents[2]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SCRIPT = """
import asyncio, sys
from opentelemetry.sdk.resources import Resource
from collegium.fabric import lifecycle, rpc, tracing
from collegium.fabric.errors import NotFound
from collegium.v1 import balancer_pb2 as pb, balancer_pb2_grpc, inference_pb2, inference_pb2_grpc

class Balancer(balancer_pb2_grpc.BalancerServicer):
    async def Leave(self, request, context):
        here = tracing.current_traceparent()
        tracing.span_from_traceparent("step", here, 1, 2, {"rows": 3})
        print("in the call", here or "-")
        return pb.LeaveResponse()

    async def Renew(self, request, context):
        raise NotFound("no lease")

class Inference(inference_pb2_grpc.InferenceServicer):
    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse()

async def main(stop):
    tracing.setup_tracing(Resource.create({"service.name": "example"}), sys.argv[1], float(sys.argv[2]))
    server = rpc.Server("balancer", services=("collegium.v1.Balancer",))
    server.add(balancer_pb2_grpc.add_BalancerServicer_to_server, Balancer())
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, Inference())
    address = await server.start("127.0.0.1:0")
    metadata = [("traceparent", sys.argv[3])] if sys.argv[3] else []
    async with rpc.channel(address) as channel:
        stub = balancer_pb2_grpc.BalancerStub(channel)
        await stub.Leave(pb.LeaveRequest(), metadata=metadata)
        try:
            await stub.Renew(pb.RenewRequest(), metadata=metadata)
        except Exception:
            pass
        if not metadata:
            await inference_pb2_grpc.InferenceStub(channel).ListModels(inference_pb2.ListModelsRequest())
    await rpc_health(address)
    await server.stop(0)

async def rpc_health(address):
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    async with rpc.channel(address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

sys.exit(lifecycle.run(main, name="example"))
"""


def run(endpoint: str, ratio: float, traceparent: str) -> str:
    command = [sys.executable, "-c", SCRIPT, endpoint, str(ratio), traceparent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sampled_caller_is_followed_through_the_call_and_below(collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    out = run(endpoint, 0.0, PARENT)
    assert servicer.services == {"example"}
    assert set(servicer.spans) == {"collegium.v1.Balancer/Leave", "collegium.v1.Balancer/Renew", "step"}
    call, step = servicer.spans["collegium.v1.Balancer/Leave"], servicer.spans["step"]
    assert call.trace_id.hex() == step.trace_id.hex() == PARENT.split("-")[1]
    assert call.parent_span_id.hex() == PARENT.split("-")[2]
    assert step.parent_span_id == call.span_id
    assert f"in the call 00-{call.trace_id.hex()}-{call.span_id.hex()}-01" in out
    assert servicer.spans["collegium.v1.Balancer/Renew"].status.message == "NOT_FOUND"


def test_a_caller_that_is_not_sampled_leaves_no_trace(collector: tuple[Collector, str]) -> None:
    servicer, endpoint = collector
    assert "in the call -" in run(endpoint, 1.0, PARENT[:-1] + "0")
    assert servicer.spans == {}


def test_of_calls_without_a_trace_callers_begin_one_in_the_given_share_and_services_none(
    collector: tuple[Collector, str],
) -> None:
    servicer, endpoint = collector
    run(endpoint, 1.0, "")
    assert set(servicer.spans) == {"collegium.v1.Inference/ListModels"}


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert "in the call -" in run("", 1.0, PARENT)
