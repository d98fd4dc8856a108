"""What a caller of the gateway sends that must cost the other callers nothing.

Each function is one attack; ATTACKS is the table. Owns no expectation about the canary: that is the same for all.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import grpc

from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from tests.strangers.rigs.attack import (
    FAULTS,
    REFUSED,
    SOON_S,
    Attack,
    at_once,
    channels,
    left_calls,
    status,
    unary_status,
)
from tests.strangers.rigs.calls import OK, Method, methods_of, status_of, unary_unary
from tests.strangers.rigs.target import LIMIT_S, MAX_MODEL_LEN, VOCAB_SIZE, Target

GATEWAY = "gateway-0"
MAX_BYTES = 4 * 2**20 - 4096
_LEFT_AFTER_S = 0.3
_STOPS = pb.Stopping(max_tokens=2, stop_strings=[bytes([97 + i]) * 1023 + b"!" for i in range(16)], ignore_eos=True)


def stub_of(channel: grpc.Channel) -> Any:
    """Return the gateway's stub on a channel."""
    return inference_pb2_grpc.InferenceStub(channel)


def ids_request(length: int = 6, **fields: Any) -> pb.GenerateRequest:
    """Ask for a continuation of ids that no other request begins with."""
    ids = [(7 * at + length) % VOCAB_SIZE for at in range(length)]
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), **fields)


def many_stop_strings(target: Target, count: int) -> None:
    """64 choices with 16 stop strings of 1 kB: by Generate to the end, by Generate and leave, and by Resume."""
    request = ids_request(stopping=_STOPS, num_choices=64, sampling=pb.Sampling(temperature=1.0, seed=3))
    resume = pb.ResumeRequest(request=request, progress=[pb.ChoiceProgress(choice_index=0, token_ids=[5])])
    with target.channel(GATEWAY) as channel, left_calls() as calls:
        stub = stub_of(channel)
        for _ in range(count):
            calls += [stub.Generate(request, timeout=LIMIT_S), stub.Resume(resume, timeout=LIMIT_S)]
        assert {status(call) for call in calls} <= {OK, "RESOURCE_EXHAUSTED"}
        for call in [stub.Generate(request, timeout=LIMIT_S) for _ in range(count)]:
            calls.append(call)
            next(call, None)


def many_of_everything(target: Target, count: int) -> None:
    """Every field at its bound at once: log-probabilities, stop ids, penalties and progress of 64 choices."""
    progress = [
        pb.ChoiceProgress(choice_index=choice, token_ids=[(at * 3 + choice) % VOCAB_SIZE for at in range(400)])
        for choice in range(64)
    ]
    request = ids_request(
        num_choices=64,
        num_logprobs=20,
        stopping=pb.Stopping(max_tokens=402, stop_ids=range(3000, 3256), ignore_eos=True),
        sampling=pb.Sampling(temperature=1.0, seed=3, repetition_penalty=1.1, frequency_penalty=0.1),
    )
    resume = pb.ResumeRequest(request=request, progress=progress)
    with target.channel(GATEWAY) as channel, left_calls() as calls:
        calls += [stub_of(channel).Resume(resume, timeout=LIMIT_S) for _ in range(count)]
        for call in calls:
            with_first = unary_status(lambda stream=call: next(stream, None))
            assert with_first not in FAULTS, with_first


def huge_texts(target: Target, count: int) -> None:
    """Texts of 4 MiB as prompt, as conversation and to score; the callers leave at once, one waits for its status."""
    text = (b"hello wonderful world, " * (MAX_BYTES // 23))[:MAX_BYTES]
    run_on = b"a" * MAX_BYTES
    requests = [
        pb.GenerateRequest(text=text),
        pb.GenerateRequest(text=run_on),
        pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=text)])),
    ]
    with channels(target, GATEWAY, count) as opened, left_calls() as calls:
        for at, channel in enumerate(opened):
            calls.append(stub_of(channel).Generate(requests[at % len(requests)]))
            calls.append(stub_of(channel).Score.future(pb.ScoreRequest(text=text)))
        threading.Event().wait(_LEFT_AFTER_S)
    with target.channel(GATEWAY) as channel:
        for request in requests if count > 1 else requests[:1]:
            ended = status(stub_of(channel).Generate(request, timeout=SOON_S))
            assert ended in REFUSED, f"a prompt of 4 MiB: {ended}"
        ended = unary_status(lambda: stub_of(channel).Score(pb.ScoreRequest(text=text), timeout=SOON_S))
        assert ended in REFUSED, f"4 MiB to score: {ended}"


def far_too_many_workers(target: Target, count: int) -> None:
    """More workers than any machine has."""
    before = target.cluster.names
    wrong: list[str] = []
    with target.channel(GATEWAY) as channel:
        stub = stub_of(channel)
        for number in (2**32 - 1, 2**31, 10**6)[:count]:
            ended = unary_status(lambda wanted=number: stub.ScaleWorkers(pb.ScaleWorkersRequest(num_workers=wanted)))
            if ended not in REFUSED:
                # Before anybody may look at what is wanted, which would start them.
                stub.ScaleWorkers(pb.ScaleWorkersRequest(num_workers=2))
                wrong.append(f"{number} workers: {ended}")
    assert not wrong, wrong
    target.cluster.tick()
    assert target.cluster.names == before


def many_choices(target: Target, count: int) -> None:
    """Requests of 64 choices each; while they run, another caller is answered."""
    request = ids_request(
        num_choices=64,
        stopping=pb.Stopping(max_tokens=64, ignore_eos=True),
        sampling=pb.Sampling(temperature=1.0, seed=1),
    )
    with channels(target, GATEWAY, min(count, 8)) as opened, left_calls() as calls:
        calls += [stub_of(opened[at % len(opened)]).Generate(request, timeout=LIMIT_S) for at in range(count)]
        target.wait_for_canary(3)


def many_scorers(target: Target, count: int) -> None:
    """Callers that score the longest texts one after another; meanwhile another caller is answered."""
    is_over = threading.Event()

    def score(number: int) -> None:
        ids = [(at * (number + 3)) % VOCAB_SIZE for at in range(MAX_MODEL_LEN)]
        request = pb.ScoreRequest(token_ids=pb.TokenIds(ids=ids))
        with target.channel(GATEWAY) as channel:
            while not is_over.is_set():
                ended = unary_status(lambda: stub_of(channel).Score(request, timeout=LIMIT_S))
                assert ended in {OK, "RESOURCE_EXHAUSTED"}, ended

    def until_answered() -> None:
        try:
            target.wait_for_canary(3)
        finally:
            is_over.set()

    at_once(count + 1, lambda number: score(number) if number < count else until_answered())


def unread_streams(target: Target, count: int) -> None:
    """Streams that nobody reads, from one caller; meanwhile another caller is answered."""
    request = ids_request(stopping=pb.Stopping(max_tokens=400, ignore_eos=True))
    with target.channel(GATEWAY) as channel, left_calls() as calls:
        calls += [stub_of(channel).Generate(request) for _ in range(count)]
        target.wait_for_canary(3)


def no_protobuf(target: Target, count: int) -> None:
    """Bytes that are no protobuf, and methods that do not exist, on every gRPC port."""
    broken = (b"\xff" * 16, b"\x0a\xff\xff\xff\xff\x0f", b"\x07", b"\x0a\x05ab", b"\x0b")[:count]
    wrong: list[str] = []
    for port in (*target.of("grpc"), *target.of("health")):
        with grpc.insecure_channel(port.address) as channel:
            methods = methods_of(channel) if port.kind == "grpc" else _probed()
            for method in methods:
                for raw in broken:
                    name, detail = status_of(channel, method, [raw], num_answers=20)
                    if name not in {"INVALID_ARGUMENT", "UNIMPLEMENTED"}:
                        wrong.append(f"{port.process} {method.path} {raw.hex()}: {name} {detail}"[:200])
            services = {method.path.split("/")[1] for method in methods} | {"nobody.Knows"}
            for path in [f"/{service}/Nothing" for service in services] + ["/", "//", "/x", "/" + "y" * 3000]:
                name, detail, _ = unary_unary(channel, path, b"\xff")
                if name != "UNIMPLEMENTED":
                    wrong.append(f"{port.process} {path[:60]}: {name} {detail}"[:200])
    assert not wrong, f"{len(wrong)} wrong: " + "\n".join(wrong[:8])


def penalised_replay(target: Target, count: int) -> None:
    """Choices with penalties, resumed after more distinct tokens than the router keeps beside each other."""
    for number in range(count):
        length = (64, 65, 100, 300)[number % 4]
        progress = pb.ChoiceProgress(choice_index=0, token_ids=range(100, 100 + length))
        request = ids_request(
            stopping=pb.Stopping(max_tokens=length + 3, ignore_eos=True),
            sampling=pb.Sampling(
                temperature=0.7, seed=9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5
            ),
        )
        with target.channel(GATEWAY) as channel:
            ended = status(
                stub_of(channel).Resume(pb.ResumeRequest(request=request, progress=[progress]), timeout=SOON_S)
            )
        assert ended == OK, f"{length} tokens: {ended}"


def wild_metadata(target: Target, count: int) -> None:
    """Metadata of callers: trace contexts that are none, many keys, large values, deadlines of nothing and of years."""
    wild: Sequence[tuple[tuple[str, str | bytes], ...]] = (
        (("traceparent", "x" * 6000),),
        (("traceparent", "00-" + "f" * 32 + "-" + "0" * 16 + "-ff"),),
        (("authorization", "Bearer " + "k" * 6000),),
        tuple((f"x-{at}", "y") for at in range(200)),
        (("x-bin", bytes(range(256)) * 16), ("grpc-previous-rpc-attempts", "9999999")),
    )
    with target.channel(GATEWAY) as channel:
        for metadata in wild[:count]:
            ended = unary_status(
                lambda held=metadata: stub_of(channel).ListModels(pb.ListModelsRequest(), metadata=held, timeout=SOON_S)
            )
            assert ended in {OK, "UNAUTHENTICATED", *REFUSED}, ended
        for timeout_s in (1e-9, 1e9):
            ended = status(
                stub_of(channel).Generate(ids_request(stopping=pb.Stopping(max_tokens=1)), timeout=timeout_s)
            )
            assert ended in {OK, "DEADLINE_EXCEEDED"}, ended


def _probed() -> list[Method]:
    from grpc_health.v1 import health_pb2

    request = health_pb2.HealthCheckRequest.DESCRIPTOR
    return [
        Method(path="/grpc.health.v1.Health/Check", request=request, streams_requests=False, streams_responses=False)
    ]


ATTACKS = (
    Attack(name="many stop strings", run=many_stop_strings, few=1, many=8, peak_mb={GATEWAY: 60.0}),
    Attack(name="many of everything", run=many_of_everything, few=1, many=8, peak_mb={GATEWAY: 100.0}),
    Attack(name="huge texts", run=huge_texts, few=2, many=12, peak_mb={GATEWAY: 200.0}),
    Attack(name="far too many workers", run=far_too_many_workers, few=2, many=3),
    Attack(name="many choices", run=many_choices, few=24, many=60),
    Attack(name="many scorers", run=many_scorers, few=16, many=16),
    Attack(name="unread streams", run=unread_streams, few=150, many=300),
    Attack(name="no protobuf", run=no_protobuf, few=2, many=5),
    Attack(name="penalised replay", run=penalised_replay, few=2, many=20),
    Attack(name="wild metadata", run=wild_metadata, few=5, many=5),
)
