"""Everything that reads what others wrote, fuzzed within one process: it refuses in its own words, or it reads.

`make soak` draws far more cases of the same tests. hypothesis prints the case that fails; the gateway's cases are
numbered, and COLLEGIUM_FUZZ_SEED chooses others.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from google.protobuf.message import DecodeError, Message
from grpc import aio
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from balancer_svc.load_windows import from_message as read_window
from balancer_svc.load_windows import read_layers
from balancer_svc.messages import from_message, from_shape, to_message, to_shape
from collegium.fabric import bounds
from collegium.fabric.errors import InvalidArgument
from collegium.fabric.views import from_proto, to_proto
from collegium.link import header
from collegium.link.frame import HEADER_BYTES, FrameError, LinkError, LinkShape
from collegium.link.hint import read_hint, read_hint_body
from collegium.link.stream import PlainStream
from collegium.link.tcp import SocketLink
from collegium.link.tcp_port import TcpPort
from collegium.v1 import balancer_pb2 as bpb
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as rpb
from router_svc.messages import sequences_of
from tests.fake_router import FakeRouter
from tests.fake_router import model as fake_model
from tests.gateway_rig import ids_request, rig, token_ids
from tests.link_rig import SECRET, dispatch, expected
from tests.strangers.fuzz import frames
from tests.strangers.fuzz.grammar import F, wild_number, wire
from tests.strangers.rigs.attack import FAULTS
from tests.strangers.rigs.target import make_checkpoint

SHAPE = LinkShape(dtype=torch.float32, reply_dtype=torch.float32, d_model=8, max_rows=64, num_credits=2)
MODEL = fake_model()
WORDS: dict[str, list[Any]] = {
    "model": ["fake-lm", ""],
    "max_tokens": [1, 8, 500],
    "num_choices": [0, 1, 64],
    "num_logprobs": [0, 20],
    "role": ["user", "assistant"],
}
NUM_SHORT, NUM_LONG = 60, 20_000
NUM_CALLS_SHORT, NUM_CALLS_LONG = 300, 50_000
SOON_S = 30.0
NUM_EXAMPLES = [pytest.param(NUM_SHORT, id="short"), pytest.param(NUM_LONG, id="long", marks=pytest.mark.soak)]
M = TypeVar("M", bound=Message)
fuzzed = pytest.mark.parametrize("num_examples", NUM_EXAMPLES)


def try_out(num_examples: int, check: Callable[[random.Random], None]) -> None:
    """Run a check with chance that hypothesis controls, so that it can make a failing case small."""
    health = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
    drawn = given(st.randoms(use_true_random=False))(check)
    settings(max_examples=num_examples, suppress_health_check=health)(drawn)()


def read(draw: random.Random, kind: type[M]) -> M:
    """Draw the bytes of a message and parse them; an empty message if they are none."""
    made, raw = kind(), wire(draw, kind.DESCRIPTOR, WORDS)
    note(f"{kind.DESCRIPTOR.name} {raw[:4000].hex()}")
    try:
        made.ParseFromString(raw)
    except DecodeError:
        return kind()
    return made


@pytest.mark.parametrize(
    "num_calls",
    [pytest.param(NUM_CALLS_SHORT, id="short"), pytest.param(NUM_CALLS_LONG, id="long", marks=pytest.mark.soak)],
)
async def test_a_gateway_answers_any_request_with_a_status_that_is_not_its_own_fault(
    tmp_path: Path, num_calls: int
) -> None:
    seed = int(os.environ.get("COLLEGIUM_FUZZ_SEED", "0"))
    verbs = ipb.DESCRIPTOR.services_by_name["Inference"].methods
    wrong: list[str] = []
    async with rig(FakeRouter(), model_dir=make_checkpoint(tmp_path / "checkpoint")) as held:
        async with aio.insecure_channel(held.address) as channel:
            for number in range(num_calls):
                draw = random.Random(f"{seed}/{number}")
                verb = draw.choice(verbs)
                raw = wire(draw, verb.input_type, WORDS)
                ended = await status_of(channel, f"/collegium.v1.Inference/{verb.name}", raw)
                if ended in FAULTS or (ended == "DEADLINE_EXCEEDED" and not verb.server_streaming):
                    wrong.append(f"seed {seed}, case {number}: {verb.name} ended with {ended}: {raw[:200].hex()}")
        answer = [one async for one in held.stub.Generate(ids_request(5, 6))]
        assert len(token_ids(answer)) == 8
    assert not wrong, f"{len(wrong)} of {num_calls}: " + "\n".join(wrong[:10])


async def status_of(channel: aio.Channel, path: str, raw: bytes) -> str:
    """Call any method with any bytes; a stream is left after two messages."""
    call = channel.unary_stream(path)(raw, timeout=SOON_S)
    try:
        for _ in range(2):
            if await call.read() is aio.EOF:
                break
        else:
            call.cancel()
            return "OK"
        return (await call.code()).name
    except aio.AioRpcError as error:
        return error.code().name


@fuzzed
def test_submissions_become_sequences_or_an_error_that_names_the_field(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        submission = read(draw, rpb.Submission)
        try:
            sequences = sequences_of(submission, 1, MODEL)
        except InvalidArgument as error:
            assert error.field
            return
        for one in sequences:
            assert 0 < len(one.prompt_ids) <= MODEL.max_model_len
            assert all(token_id < MODEL.vocab_size for token_id in (*one.prompt_ids, *one.output_ids))
        assert len({one.choice_index for one in sequences}) == len(sequences)

    try_out(num_examples, check)


@fuzzed
def test_reports_of_load_are_read_or_refused(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        report = read(draw, bpb.ReportLoadRequest) if draw.random() < 0.5 else load_report(draw)
        try:
            bounds.check(report)
            counts = read_layers(report.layers)
        except ValueError:
            return
        assert (counts >= 0).all()
        assert [int(n) for n in counts[0].ravel()] == [n for layer in report.layers for n in layer.decode_tokens]

    try_out(num_examples, check)


def load_report(draw: random.Random) -> bpb.ReportLoadRequest:
    """Make a report of a shape that can be, with numbers that need not."""
    num_layers, num_experts = draw.randint(1, 3), draw.randint(1, 4)

    def row() -> list[int]:
        is_wild = draw.random() < 0.3
        return [int(wild_number(draw, F.TYPE_UINT64)) if is_wild else draw.randrange(99) for _ in range(num_experts)]

    return bpb.ReportLoadRequest(
        layers=[bpb.LayerLoad(decode_tokens=row(), prefill_tokens=row(), activations=row()) for _ in range(num_layers)]
    )


@fuzzed
def test_windows_members_and_shapes_are_read_as_they_were_written_or_refused(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        window, member, shape = read(draw, bpb.LoadWindow), read(draw, bpb.Member), read(draw, bpb.ModelShape)
        for message, read_one in (
            (window, lambda: read_window(window)),
            (member, lambda: to_message(from_message(member))),
            (shape, lambda: to_shape(from_shape(shape))),
        ):
            try:
                bounds.check(message)
                read_one()
            except ValueError as error:
                assert str(error)

    try_out(num_examples, check)


@fuzzed
def test_placements_are_read_or_refused(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        message = read(draw, bpb.Placement)
        try:
            placement = from_proto(message)
        except ValueError:
            return
        assert from_proto(to_proto(placement)) == placement
        assert sum(placement.num_homes().values()) == sum(len(layer.worker_idx) for layer in message.layers)

    try_out(num_examples, check)


@fuzzed
def test_headers_of_frames_are_read_or_refused(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        raw = draw.choice((frames.frame(draw, SHAPE, 2, 8), frames.reply(draw, SHAPE, 1, 2)))
        head, body = raw[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), raw[HEADER_BYTES:]

        def read_whole_hint() -> None:
            advice = read_hint(head, SHAPE)
            assert advice.body_bytes <= 4 * SHAPE.max_groups
            if len(body) >= advice.body_bytes:
                read_hint_body(advice, body[: advice.body_bytes], SHAPE)

        for read_one in (
            lambda: header.read_common(head),
            lambda: header.read_dispatch(head, SHAPE),
            lambda: header.read_reply(head, SHAPE),
            read_whole_hint,
            lambda: header.read_hello(body[: header.HELLO_BYTES].ljust(header.HELLO_BYTES, b"\0")),
            lambda: header.read_welcome(body, torch.float32, 8),
        ):
            try:
                read_one()
            except FrameError as error:
                assert str(error)

    try_out(num_examples, check)


@fuzzed
def test_a_router_that_is_answered_anything_gets_a_reply_or_a_link_error(num_examples: int) -> None:
    def check(draw: random.Random) -> None:
        mine, other = socket.socketpair()
        link = SocketLink(
            PlainStream(mine, is_blocking=True), transport="unix", link_id=1, worker_id="worker-a", shape=SHAPE
        )
        try:
            link.send(dispatch(1))
            for _ in range(draw.randint(1, 3)):
                other.sendall(frames.reply(draw, SHAPE, 1, 3))
            other.shutdown(socket.SHUT_WR)
            reply = link.receive(1, time.monotonic() + SOON_S)
            assert reply.y is None or reply.y.shape == (3, SHAPE.d_model)
        except LinkError as error:
            assert str(error)
        finally:
            link.close()
            other.close()

    try_out(num_examples, check)


@fuzzed
def test_a_worker_that_is_sent_anything_serves_the_link_beside_it(num_examples: int) -> None:
    port = TcpPort(worker_id="worker-a", bind="127.0.0.1:0")
    host, _, number = dict(port.addresses)["tcp"].rpartition(":")
    good = open_by_hand(port, (host, int(number)), 1)
    ids = iter(range(2, 10**9))

    def check(draw: random.Random) -> None:
        link_id = next(ids)
        port.expect(expected(link_id, max_rows=SHAPE.max_rows, num_credits=SHAPE.num_credits))
        with socket.create_connection((host, int(number))) as bad:
            bad.sendall(frames.hello(draw, link_id, SECRET, torch.float32, SHAPE.d_model))
            poll(port, lambda: False, 0.002)
            try:
                for _ in range(draw.randint(1, 4)):
                    bad.sendall(frames.frame(draw, SHAPE, 2, 8))
            except OSError:
                pass
            arrivals = poll(port, lambda: False, 0.002)
            for arrival in arrivals:
                port.reply(arrival.link_id, frames.answer(arrival.dispatch))
        good.send(dispatch(link_id))
        arrivals = poll(port, lambda: False, 0.0)
        found: list[Any] = []
        until_s = time.monotonic() + SOON_S
        while not found and time.monotonic() < until_s:
            arrivals += port.poll(0.01)
            found = [one for one in arrivals if one.link_id == 1 and one.dispatch.seq == link_id]
        assert found, "the good link was not served"
        for arrival in arrivals:
            port.reply(arrival.link_id, frames.answer(arrival.dispatch))
        assert good.receive(link_id, time.monotonic() + SOON_S).y is not None

    try:
        try_out(num_examples, check)
        until_s = time.monotonic() + SOON_S
        while len(port.links()) > 1 and time.monotonic() < until_s:
            port.poll(0.01)
        assert list(port.links()) == [1], "links of peers that have gone are still there"
    finally:
        good.close()
        port.close()


def poll(port: TcpPort, is_done: Callable[[], bool], seconds: float) -> list[Any]:
    """Let a port do what it can for a while; returns what arrived."""
    arrivals, until_s = port.poll(0.0), time.monotonic() + seconds
    while not is_done() and time.monotonic() < until_s:
        arrivals += port.poll(0.001)
    return arrivals


def open_by_hand(port: TcpPort, address: tuple[str, int], link_id: int) -> SocketLink:
    """Open a good link in the thread that polls the port."""
    port.expect(expected(link_id, max_rows=SHAPE.max_rows, num_credits=SHAPE.num_credits))
    sock = socket.create_connection(address)
    sock.sendall(header.hello(link_id, SECRET, torch.float32, SHAPE.d_model))
    poll(port, lambda: bool(port.links()), SOON_S)
    sock.settimeout(SOON_S)
    common = header.read_common(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    shape, worker_id = header.read_welcome(sock.recv(common.body_bytes, socket.MSG_WAITALL), torch.float32, 8)
    return SocketLink(
        PlainStream(sock, is_blocking=True), transport="tcp", link_id=link_id, worker_id=worker_id, shape=shape
    )
