"""Router.Trace and `collegium trace`: what the gates of running requests choose, over real gRPC.

The engine and its workers run in this process; `tests/congruence/test_machinery.py` traces a real cluster.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc import aio

from benchmarks.one_process import OneProcess, Request
from collegium.buffering.traces import read_trace
from collegium.cli.main import main
from collegium.fabric import rpc
from collegium.fabric.errors import ResourceExhausted, Unavailable
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc
from router_svc.choices import LayerChoices, StepChoices
from router_svc.service import Outboxes, RouterService
from tests.gateway_rig import error_of, gather, until
from tests.oracle import Oracle

ROOT = Path(__file__).parent.parent.parent
EXPERT_BYTES = 1000
PROMPTS = [[9, 10, 11, 12, 13], [21, 22, 23]]
MAX_TOKENS = 18
NUM_TOKENS = sum(len(prompt) + MAX_TOKENS - 1 for prompt in PROMPTS)  # the last token drawn is not computed


@dataclass
class Served:
    """A router's service over an engine of this process."""

    address: str
    stub: Any
    service: RouterService
    cluster: OneProcess

    @property
    def listeners(self) -> tuple[Any, ...]:
        """Whom the engine tells."""
        return self.cluster.engine.listeners._members

    async def run(self) -> None:
        """Serve the requests to their ends."""
        requests = [Request(prompt_ids=prompt, max_tokens=MAX_TOKENS) for prompt in PROMPTS]
        answers = await asyncio.to_thread(self.cluster.run, requests)
        assert not any(answer.failure for (answer,) in answers)


@asynccontextmanager
async def serve(oracle: Oracle, **options: Any) -> AsyncIterator[Served]:
    """Serve the tiny mixtral: 3 MoE layers of 8 experts, top 2."""
    service = RouterService(Outboxes(asyncio.get_running_loop()))
    server = rpc.Server("router", services=("collegium.v1.Router",))
    router_pb2_grpc.add_RouterServicer_to_server(service, server.grpc)
    with OneProcess(oracle.checkpoint("mixtral"), **({"num_workers": 2} | options)) as cluster:
        model = inference_pb2.Model(name="tiny", architecture="mixtral", num_moe_layers=3, num_experts=8, top_k=2)
        service.open(cluster.engine.commands, cluster.engine.listeners, model, [EXPERT_BYTES] * 3)
        address = await server.start("127.0.0.1:0")
        try:
            async with aio.insecure_channel(address) as channel:
                stub: Any = router_pb2_grpc.RouterStub(channel)
                yield Served(address=address, stub=stub, service=service, cluster=cluster)
        finally:
            await server.stop(0)


async def first(call: Any) -> router_pb2.TraceResponse:
    """Read a stream's first message."""
    return await anext(aiter(call))


async def test_every_position_of_every_sequence_is_told_once_even_where_it_is_computed_again(oracle: Oracle) -> None:
    seen: dict[tuple[int, int, int], list[int]] = {}
    async with serve(oracle, kv_tokens=48, max_batch_tokens=4) as served:
        call = served.stub.Trace(router_pb2.TraceRequest(num_tokens=NUM_TOKENS))
        header = (await first(call)).header
        assert (header.model.name, list(header.expert_bytes)) == ("tiny", [EXPERT_BYTES] * 3)
        _, messages = await asyncio.gather(served.run(), gather(call))
        assert served.cluster.engine.scheduler.num_preemptions > 0
        assert served.listeners == ()
    for step in (message.step for message in messages):
        for layer in step.layers:
            for row, (number, position) in enumerate(zip(step.sequences, step.positions, strict=True)):
                key = (number, position, layer.layer)
                assert key not in seen
                seen[key] = list(layer.experts[2 * row : 2 * row + 2])
                weights = layer.weights[2 * row : 2 * row + 2]
                assert weights[0] >= weights[1] > 0
    assert seen.keys() == {
        (number, position, layer)
        for number, prompt in enumerate(PROMPTS, 1)
        for position in range(len(prompt) + MAX_TOKENS - 1)
        for layer in range(3)
    }
    assert all(len(set(experts)) == 2 for experts in seen.values())


async def test_a_large_step_is_told_in_several_messages_that_are_whole_together(oracle: Oracle) -> None:
    async with serve(oracle) as served:
        call = served.stub.Trace(router_pb2.TraceRequest(num_tokens=1))
        await first(call)
        shape = (60_000, 2)
        layers = [
            LayerChoices(
                layer=layer,
                ids=np.full(shape, layer),
                weights=np.full(shape, 0.5, dtype=np.float32),
                missed=np.array([layer], dtype=np.uint16),
            )
            for layer in range(3)
        ]
        served.listeners[0](
            StepChoices(step=4, sequences=[1] * 60_000, positions=list(range(60_000)), num_decode_rows=0, layers=layers)
        )
        messages = await gather(call)
    assert len(messages) == 3
    assert [(m.step.step, m.step.layers[0].layer, list(m.step.layers[0].missed)) for m in messages] == [
        (4, layer, [layer]) for layer in range(3)
    ]
    assert max(message.ByteSize() for message in messages) < rpc.MAX_MESSAGE_BYTES / 4


async def test_a_reader_that_is_too_slow_is_told_so_after_what_it_was_promised(oracle: Oracle) -> None:
    nothing = StepChoices(step=1, sequences=[1], positions=[0], num_decode_rows=0, layers=[])
    async with serve(oracle) as served:
        call = served.stub.Trace(router_pb2.TraceRequest())
        await first(call)
        for _ in range(1000):  # all of them before the event loop has a turn
            served.listeners[0](nothing)
        error = await error_of(call)
        assert served.listeners == ()
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "SLOW_READER"


async def test_a_router_that_drains_ends_its_traces_and_one_that_loads_has_none(oracle: Oracle) -> None:
    async with serve(oracle) as served:
        call = served.stub.Trace(router_pb2.TraceRequest())
        await first(call)
        served.service.is_draining = True
        served.service.end_traces()
        error, again = await error_of(call), await error_of(served.stub.Trace(router_pb2.TraceRequest()))
        served.service._commands = None
        loading = await error_of(served.stub.Trace(router_pb2.TraceRequest()))
    assert [(type(one), one.reason) for one in (error, again, loading)] == [
        (Unavailable, "DRAINING"),
        (Unavailable, "DRAINING"),
        (Unavailable, "LOADING"),
    ]


async def test_a_caller_that_leaves_is_listened_to_no_more(oracle: Oracle) -> None:
    async with serve(oracle) as served:
        call = served.stub.Trace(router_pb2.TraceRequest())
        await first(call)
        assert len(served.listeners) == 1
        call.cancel()
        await until(lambda: not served.listeners)


async def test_trace_writes_what_replay_reads(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    async with serve(oracle) as served:
        argv = ["collegium", "trace", str(out), "--router", served.address, "--tokens", str(NUM_TOKENS)]
        monkeypatch.setattr(sys, "argv", argv)
        tracing = asyncio.create_task(asyncio.to_thread(main))
        await until(lambda: bool(served.listeners))
        await served.run()
        assert await tracing == 0
    trace = read_trace(out)
    assert (trace.header.model, trace.header.num_experts, trace.header.top_k) == ("tiny", 8, 2)
    assert len(trace) == NUM_TOKENS * 3 * 2
    # Turns are numbered as they were first computed: in which order depends on when the router heard of them.
    first_is_longest = (trace.turn == 0).sum() > (trace.turn == 1).sum()
    for turn, prompt in enumerate(sorted(PROMPTS, key=len, reverse=bool(first_is_longest))):
        mine = (trace.turn == turn) & (trace.layer == 2) & (trace.slot == 0)
        assert trace.step[mine].tolist() == list(range(len(prompt) + MAX_TOKENS - 1))
        assert trace.phase[mine].tolist() == [0] * len(prompt) + [1] * (MAX_TOKENS - 1)
    assert set(trace.residency.tolist()) == {1}
    assert f"recorded {NUM_TOKENS} tokens of 2 sequences" in capfd.readouterr().err


async def test_an_expert_that_was_loaded_for_a_step_is_not_resident_in_it_and_its_bytes_count_once(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    async with serve(oracle) as served:
        argv = ["collegium", "trace", str(out), "--router", served.address, "--tokens", "2"]
        monkeypatch.setattr(sys, "argv", argv)
        tracing = asyncio.create_task(asyncio.to_thread(main))
        await until(lambda: bool(served.listeners))
        weights = np.full((2, 2), 0.5, dtype=np.float32)
        layers = [
            LayerChoices(
                layer=layer,
                ids=np.array([[1, 2], [2, 3]]),
                weights=weights,
                missed=np.array([2, 3] if layer else [], dtype=np.uint16),
            )
            for layer in range(3)
        ]
        served.listeners[0](StepChoices(step=1, sequences=[5, 6], positions=[7, 0], num_decode_rows=1, layers=layers))
        assert await tracing == 0
    trace = read_trace(out)
    columns = (trace.turn, trace.phase, trace.expert, trace.residency, trace.expert_bytes)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert rows[:4] == [(0, 1, 1, 1, 0), (0, 1, 2, 1, 0), (1, 0, 2, 1, 0), (1, 0, 3, 1, 0)]
    assert rows[4:8] == [(0, 1, 1, 1, 0), (0, 1, 2, 0, EXPERT_BYTES), (1, 0, 2, 0, 0), (1, 0, 3, 0, EXPERT_BYTES)]


async def test_misses_of_a_small_buffer_are_told_and_nothing_else_is(oracle: Oracle) -> None:
    async with serve(oracle, num_workers=1, expert_memory="50%", can_prefetch=False) as served:
        call = served.stub.Trace(router_pb2.TraceRequest(num_tokens=NUM_TOKENS))
        await first(call)
        _, messages = await asyncio.gather(served.run(), gather(call))
        num_misses = sum(buffer.totals.misses for buffer in served.cluster.buffers)
    layers = [layer for message in messages for layer in message.step.layers]
    assert all(set(layer.missed) <= set(layer.experts) for layer in layers)
    assert sum(len(layer.missed) for layer in layers) == num_misses > 0


async def test_ctrl_c_keeps_what_was_recorded(oracle: Oracle, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    async with serve(oracle) as served:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "collegium", "trace", str(out), "--router", served.address),
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        await until(lambda: bool(served.listeners))
        while len(out.read_text().splitlines()) < 100:  # it writes as it goes
            await served.run()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 0
    assert b"tokens of" in err
    assert len(read_trace(out)) >= 90


async def test_routers_that_cannot_be_reached_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags, named in (
        (("--router", "127.0.0.1:1"), "UNAVAILABLE"),
        (("--router", "nonsense"), "--router='nonsense'"),
        (("--target", "127.0.0.1:1"), "UNAVAILABLE"),
    ):
        monkeypatch.setattr(sys, "argv", ["collegium", "trace", str(tmp_path / "o.csv"), *flags])
        assert await asyncio.to_thread(main) in (1, 2)
        assert named in capfd.readouterr().err
