"""What an internal peer, a broken file or a broken value does that must harm nobody else.

Each function is one attack; ATTACKS is the table. Peers speak to the balancer, the router and the workers directly.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.v1 import balancer_pb2 as bpb
from collegium.v1 import balancer_pb2_grpc, expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from collegium.v1 import inference_pb2 as ipb
from tests.strangers.rigs.attack import FAULTS, REFUSED, SOON_S, Attack, left_calls, status, unary_status
from tests.strangers.rigs.calls import OK
from tests.strangers.rigs.target import LIMIT_S, MAX_MODEL_LEN, NUM_LAYERS, VOCAB_SIZE, Target

U32, U63, U64 = 2**32 - 1, 2**63, 2**64 - 1
BALANCER, ROUTER, WORKER, SICK = "balancer", "router-0", "worker-0", "worker-1"
FIRST = router_pb2.ChoiceStart()
_WATCH_S = 0.6  # some of the balancer's ticks
_NOBODY = "127.0.0.1:1"


@contextmanager
def balancer_stub(target: Target) -> Iterator[Any]:
    """Open a stub to the balancer."""
    with target.channel(BALANCER) as channel:
        yield balancer_pb2_grpc.BalancerStub(channel)


def view_of(stub: Any) -> bpb.WatchPlacementResponse:
    """Read the cluster's view."""
    return stub.GetPlacement(bpb.GetPlacementRequest(), timeout=SOON_S).view


def wild_joins(target: Target, count: int) -> None:
    """Join with numbers that no member has; what is let in leaves again, and the placement stays what it was."""
    true = target.shape
    worker = {"role": bpb.ROLE_WORKER, "address": _NOBODY, "num_threads": 1}
    refused = [
        bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address=_NOBODY, seen_epoch=U64),
        bpb.JoinRequest(role=bpb.ROLE_ROUTER, address=_NOBODY, seen_epoch=U63),
        bpb.JoinRequest(**worker, model=_other(true, layers=true.layers[:1])),
        bpb.JoinRequest(**worker, model=_other(true, layers=[])),
        bpb.JoinRequest(**worker, model=_other(true, layers=_layers(31, true.layers[0].expert_bytes))),
        bpb.JoinRequest(**worker, model=_other(true, layers=_layers(U32, U64))),
        bpb.JoinRequest(**worker, model=_other(true, layers=_layers(0, 0))),
        bpb.JoinRequest(**worker, model=_other(true, digest="another")),
        bpb.JoinRequest(**worker),
        bpb.JoinRequest(role=9, address=_NOBODY),  # type: ignore[arg-type]
        bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address=""),
        bpb.JoinRequest(role=bpb.ROLE_ROUTER, address="x" * 1_000_000),
    ]
    tolerated = [  # what only a trusted peer can know to be wrong: let in or refused, it harms nobody
        bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address="no address", metrics_url="y" * 100_000),
        bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address=_NOBODY, num_threads=U32, failure_domain="z" * 100_000),
        bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address=_NOBODY, capacity_bytes=U64),
    ]
    wrong: list[str] = []
    with balancer_stub(target) as stub:
        before = view_of(stub)
        for request in refused[:count]:
            ended = _join_and_leave(stub, request)
            if ended not in REFUSED:
                wrong.append(f"{str(request)[:120]}: {ended}")
        for request in tolerated:
            ended = _join_and_leave(stub, request)
            if ended in FAULTS:
                wrong.append(f"{str(request)[:120]}: {ended}")
        target.watch(_WATCH_S)
        after = view_of(stub)
    assert not wrong, "\n".join(wrong)
    assert len(after.placement.layers) == len(before.placement.layers)
    assert after.placement.epoch <= before.placement.epoch + 10


def wild_renewals(target: Target, count: int) -> None:
    """A member that renews with epochs, plans, states and counters that cannot be."""
    wild: list[dict[str, Any]] = [
        {"seen_epoch": U64},
        {"ready_plan": U64},
        {"seen_epoch": U63, "ready_plan": U63},
        {"state": 99},
        {"counters": {"collegium_worker_rows_total": math.nan, "a": math.inf, "b": -math.inf, "": 1e308}},
        {"counters": {f"collegium_{at}": 1.0 for at in range(20_000)}},
        {"counters": {"n" * 100_000: 1.0}},
    ]
    with balancer_stub(target) as stub:
        member = stub.Join(bpb.JoinRequest(role=bpb.ROLE_GATEWAY, address=_NOBODY), timeout=SOON_S).member_id
        try:
            before = view_of(stub)
            for fields in wild[:count]:
                request = bpb.RenewRequest(member_id=member, **fields)
                ended = unary_status(lambda held=request: stub.Renew(held, timeout=SOON_S))
                assert ended in REFUSED | {OK, "NOT_FOUND"}, f"{str(request)[:120]}: {ended}"
            for lost in ("", "x" * 100_000, "worker-0000000000"):
                ended = unary_status(lambda who=lost: stub.Renew(bpb.RenewRequest(member_id=who), timeout=SOON_S))
                assert ended in REFUSED | {"NOT_FOUND"}, ended
            target.watch(_WATCH_S)
            assert view_of(stub).placement.epoch <= before.placement.epoch + 10
        finally:
            stub.Leave(bpb.LeaveRequest(member_id=member), timeout=SOON_S)


def wild_loads(target: Target, count: int) -> None:
    """A router that reports loads near the largest numbers, falling ones, and loads of another shape."""
    wrong: list[str] = []
    with balancer_stub(target) as stub:
        member = stub.Join(bpb.JoinRequest(role=bpb.ROLE_ROUTER, address=_NOBODY), timeout=SOON_S).member_id
        try:
            for tokens in (U64, U63, U63 - 1, U63 // 2, U63 // 2 + 1)[:count]:
                request = bpb.ReportLoadRequest(member_id=member, layers=[_load(tokens, 32)] * NUM_LAYERS)
                ended = unary_status(lambda held=request: stub.ReportLoad(held, timeout=SOON_S))
                if ended not in REFUSED:
                    wrong.append(f"counts of {tokens}: {ended}")
            odd = [
                [],
                [_load(1, 32)] * 7,
                [_load(1, 31)] * 6,
                [_load(1, 0)] * 6,
                [bpb.LayerLoad(decode_tokens=[1])] * 6,
                [_load(1, 100_000)] * 6,
            ]
            for layers in odd:
                request = bpb.ReportLoadRequest(member_id=member, layers=layers)
                ended = unary_status(lambda held=request: stub.ReportLoad(held, timeout=SOON_S))
                if ended not in REFUSED:
                    wrong.append(f"{len(layers)} layers of an odd shape: {ended}")
            target.watch(_WATCH_S)
        finally:
            stub.Leave(bpb.LeaveRequest(member_id=member), timeout=SOON_S)
    assert not wrong, "\n".join(wrong)


def wild_submissions(target: Target, count: int) -> None:
    """Submissions that no gateway makes, straight to the router: each fails alone, with a status of its own."""
    limits = ipb.Stopping(max_tokens=3, ignore_eos=True)
    base: dict[str, Any] = {"prompt_ids": [7, 8, 9], "sampling": ipb.Sampling(seed=1), "stopping": limits}

    def made(**changes: Any) -> router_pb2.Submission:
        return router_pb2.Submission(**(base | {"choices": [router_pb2.ChoiceStart()]} | changes))

    def start(*output_ids: int, choice: int = 0) -> list[router_pb2.ChoiceStart]:
        return [router_pb2.ChoiceStart(choice_index=choice, output_ids=output_ids)]

    invalid = [
        made(choices=start(VOCAB_SIZE)),
        made(choices=start(U32)),
        made(is_score=True, choices=start(5)),
        made(choices=start() * 30),
        made(prompt_ids=[]),
        made(prompt_ids=[VOCAB_SIZE]),
        made(prompt_ids=[1] * (MAX_MODEL_LEN + 1)),
        made(choices=start(*[1] * MAX_MODEL_LEN)),
        made(stopping=ipb.Stopping(max_tokens=3, stop_ids=[VOCAB_SIZE])),
        made(num_logprobs=U32),
        made(sampling=ipb.Sampling(temperature=math.nan, seed=1)),
        made(sampling=ipb.Sampling(temperature=-1.0, seed=1)),
        made(sampling=ipb.Sampling(temperature=1.0, top_p=math.inf, seed=1)),
        made(sampling=ipb.Sampling(temperature=1.0, min_p=-1.0, seed=1)),
        made(sampling=ipb.Sampling(repetition_penalty=0.0, seed=1)),
        made(sampling=ipb.Sampling(presence_penalty=math.inf, seed=1)),
        made(sampling=ipb.Sampling(frequency_penalty=math.nan, seed=1)),
        made(choices=[router_pb2.ChoiceStart(choice_index=at) for at in range(5000)]),
    ]
    tolerated = [
        made(choices=[]),
        made(choices=start(choice=U32)),
        made(stopping=ipb.Stopping(max_tokens=U32, min_tokens=U32), deadline_ms=200),
        made(deadline_ms=U64),
        made(traceparent="x" * 10_000),
        made(sampling=ipb.Sampling(temperature=1.0, top_k=U32, seed=U64)),
        made(
            sampling=ipb.Sampling(repetition_penalty=1.3, presence_penalty=0.5, seed=1),
            choices=start(*range(200)),
            stopping=ipb.Stopping(max_tokens=202, ignore_eos=True),
        ),
    ]
    for at, submission in enumerate([*invalid, *tolerated]):
        submission.request_id = f"wild-{at}"
    wrong: list[str] = []
    for at, submission in enumerate([*invalid[:count], *tolerated]):
        codes = _attach(target, submission)
        is_refused = codes == {"INVALID_ARGUMENT"}
        if not codes or codes & FAULTS or (submission in invalid and not is_refused):
            wrong.append(f"{at}: {str(submission).split()[8:40]}: {codes or 'no answer'}")
    assert not wrong, "\n".join(wrong)


def same_names(target: Target, count: int) -> None:
    """Two submissions of one name: the second one is refused, and the first goes on."""
    one = router_pb2.Submission(
        request_id="twin",
        prompt_ids=[3, 4, 5],
        sampling=ipb.Sampling(seed=1),
        stopping=ipb.Stopping(max_tokens=40, ignore_eos=True),
        choices=[router_pb2.ChoiceStart()],
    )
    codes = _attach(target, *[one] * (1 + count))
    assert codes & {"INVALID_ARGUMENT", "ALREADY_EXISTS"}, codes
    assert not codes & FAULTS, codes
    long = router_pb2.Submission()
    long.CopyFrom(one)
    long.request_id = "n" * 100_000
    assert not _attach(target, long) & FAULTS


def wild_references(target: Target, count: int) -> None:
    """Cancellations, pauses and the like of sequences that do not exist, and a gateway id of 1 MB."""
    refs = [
        router_pb2.SequenceRef(request_id="r" * 10_000, choice_index=U32),
        router_pb2.SequenceRef(),
        *[router_pb2.SequenceRef(request_id=f"nobody-{at}") for at in range(2000)],
    ]
    frame = router_pb2.AttachRequest(gateway_id="g" * 2**20, cancellations=refs, pauses=refs, unpauses=refs)
    with target.channel(ROUTER) as channel, left_calls() as calls:
        for _ in range(count):
            call = router_pb2_grpc.RouterStub(channel).Attach(iter([frame]), timeout=SOON_S)
            calls.append(call)
            assert status(call) not in FAULTS


def wild_links(target: Target, count: int) -> None:
    """OpenLink with names of 100 kB, of other models, with wild sizes, again and again."""
    plain = {"model_digest": target.shape.digest, "dtype": "float32", "transports": ["tcp"], "max_rows": 8}
    refused: list[dict[str, Any]] = [
        {"router_id": "r" * 100_000},
        {"max_rows": U32},
        {"max_rows": 0},
        {"model_digest": "m" * 100_000},
        {"dtype": "d" * 100_000},
        {"transports": ["t" * 1000] * 1000},
        {"transports": []},
    ]
    with target.channel(WORKER) as channel:
        stub = expert_pb2_grpc.ExpertStub(channel)
        for fields in refused:
            request = expert_pb2.OpenLinkRequest(**(plain | {"router_id": "r1"} | fields))
            ended = unary_status(lambda held=request: stub.OpenLink(held, timeout=SOON_S))
            assert ended in REFUSED, f"{str(request)[:120]}: {ended}"
        request = expert_pb2.OpenLinkRequest(**plain, router_id="r" * 100_000, host="h" * 100_000)
        for _ in range(count):
            ended = unary_status(lambda: stub.OpenLink(request, timeout=SOON_S))
            assert ended in REFUSED, ended


def long_names(target: Target, count: int) -> None:
    """Health checks of services with names of 5 kB and more, on every port that answers them."""
    wrong: list[str] = []
    for port in (*target.of("grpc"), *target.of("health")):
        with grpc.insecure_channel(port.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for length in (5000, 200_000, 2_000_000)[:count]:
                request = health_pb2.HealthCheckRequest(service="s" * length)
                ended = unary_status(lambda one=stub, held=request: one.Check(held, timeout=SOON_S))
                if ended not in {"NOT_FOUND", "INVALID_ARGUMENT"}:
                    wrong.append(f"{port.process} {port.kind}, a name of {length}: {ended}")
    assert not wrong, "\n".join(wrong)


def watchers(target: Target, count: int) -> None:
    """Watches and traces that nobody reads; they are left all at once."""
    with left_calls() as calls, target.channel(BALANCER) as balancer, target.channel(ROUTER) as router:
        for at in range(count):
            watch = bpb.WatchPlacementRequest(member_id="w" * (1 + 100 * at))
            calls += [
                balancer_pb2_grpc.BalancerStub(balancer).WatchPlacement(watch),
                health_pb2_grpc.HealthStub(router).Watch(health_pb2.HealthCheckRequest(service="s" * 1000)),
                router_pb2_grpc.RouterStub(router).Trace(router_pb2.TraceRequest()),
            ]
        target.wait_for_canary(3)


def broken_values(target: Target, count: int) -> None:
    """Every value in Redis made another one that cannot be read, then the balancer starts from it."""
    broken: list[bytes] = [b"many", b"\xff\xfe\x00not utf-8", b"-1", b"9" * 40, b""]
    store = redis.Redis.from_url(target.redis.url)
    try:
        for raw in broken[:count]:
            keys: list[bytes] = sorted(store.scan_iter("*"))
            assert keys
            for key in keys:
                _break(store, key, raw)
            target.watch(_WATCH_S)  # what reads them while it runs
            for key in keys:
                _break(store, key, raw)
            starts = target.cluster.num_starts(BALANCER)
            target.cluster.kill(BALANCER)
            target.cluster.wait_until(lambda before=starts: target.cluster.num_starts(BALANCER) > before, LIMIT_S)
            target.cluster.wait_until_serving(limit_s=LIMIT_S)
            assert target.cluster.num_starts(BALANCER) == starts + 1, f"after {raw!r}: {target.said(BALANCER)}"
            target.note_processes()
    finally:
        store.close()


def sick_member(target: Target, count: int) -> None:
    """A worker that dies as soon as it serves, more often than any patience; the others serve on."""
    others = {name: target.cluster.pid(name) for name in target.pids if name != SICK}
    for _ in range(count):
        starts = target.cluster.num_starts(SICK)
        target.cluster.kill(SICK)
        target.cluster.wait_until(lambda before=starts: target.cluster.num_starts(SICK) > before, LIMIT_S)
    target.cluster.wait_until_serving(limit_s=LIMIT_S)
    assert {name: target.cluster.pid(name) for name in others} == others
    target.note_processes()


def _other(true: bpb.ModelShape, **changes: Any) -> bpb.ModelShape:
    """Copy the model's shape and change something in it."""
    fields = {"digest": true.digest, "layers": true.layers, "parts": true.parts}
    return bpb.ModelShape(**(fields | changes))


def _layers(num_experts: int, expert_bytes: int) -> list[bpb.LayerShape]:
    return [bpb.LayerShape(num_experts=num_experts, expert_bytes=expert_bytes)] * NUM_LAYERS


def _load(tokens: int, num_experts: int) -> bpb.LayerLoad:
    row = [tokens] * num_experts
    return bpb.LayerLoad(decode_tokens=row, prefill_tokens=row, activations=row)


def _join_and_leave(stub: Any, request: bpb.JoinRequest) -> str:
    try:
        member = stub.Join(request, timeout=SOON_S).member_id
    except grpc.RpcError as error:
        return error.code().name  # type: ignore[attr-defined]
    stub.Leave(bpb.LeaveRequest(member_id=member), timeout=SOON_S)
    return OK


def _attach(target: Target, *submissions: router_pb2.Submission) -> set[str]:
    """Submit on a stream of its own; returns the codes of what failed, and OK where a choice ended well."""
    wanted = {(one.request_id, start.choice_index) for one in submissions for start in one.choices or [FIRST]}
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    codes: set[str] = set()
    with target.channel(ROUTER) as channel, left_calls() as calls:
        held = _Held([router_pb2.AttachRequest(gateway_id="g", submissions=submissions)])
        call = router_pb2_grpc.RouterStub(channel).Attach(iter(held), timeout=SOON_S)
        calls += [call, held]
        try:
            for frame in call:
                for news in frame.news:
                    if news.HasField("failure"):
                        codes.add(names[news.failure.code])  # of one choice, or of all of them
                        wanted = {one for one in wanted if one[0] != news.request_id}
                    elif news.finish_reason:
                        codes.add(OK)
                        wanted.discard((news.request_id, news.choice_index))
                if not wanted:
                    break
        except grpc.RpcError as error:
            codes.add(error.code().name)  # type: ignore[attr-defined]
    return codes


class _Held:
    """Requests, and then silence until it is cancelled: the gateway's half of a stream stays open."""

    def __init__(self, requests: list[router_pb2.AttachRequest]) -> None:
        self._requests = requests
        self._is_over = threading.Event()

    def __iter__(self) -> Iterator[router_pb2.AttachRequest]:
        yield from self._requests
        self._is_over.wait(SOON_S)

    def cancel(self) -> None:
        """End the silence."""
        self._is_over.set()


def _break(store: redis.Redis, key: bytes, raw: bytes) -> None:
    """Put a value that cannot be read in the place of each value of a key."""
    kind = store.type(key)
    if kind == b"string":
        store.set(key, raw, keepttl=True)
    elif kind == b"hash":
        store.hset(key, mapping=dict.fromkeys(store.hkeys(key), raw))  # type: ignore[arg-type]
    elif kind == b"list":
        length = int(store.llen(key))  # type: ignore[arg-type]
        for at in range(length):
            store.lset(key, at, raw)  # type: ignore[arg-type]
    elif kind == b"set":
        store.sadd(key, raw)
    elif kind == b"stream":
        store.xadd(key, {b"epoch": raw, b"placement": raw})


ATTACKS = (
    Attack(name="wild joins", run=wild_joins, few=12, many=12),
    Attack(name="wild renewals", run=wild_renewals, few=7, many=7),
    Attack(name="wild loads", run=wild_loads, few=5, many=5),
    Attack(name="wild submissions", run=wild_submissions, few=99, many=99),
    Attack(name="same names", run=same_names, few=1, many=30),
    Attack(name="wild references", run=wild_references, few=1, many=10),
    Attack(name="wild links", run=wild_links, few=100, many=3000, peak_mb={WORKER: 60.0}),
    Attack(name="long names", run=long_names, few=2, many=3),
    Attack(name="watchers", run=watchers, few=10, many=100),
    Attack(name="broken values", run=broken_values, few=1, many=5, restarts=frozenset({BALANCER})),
    Attack(name="sick member", run=sick_member, few=1, many=9, restarts=frozenset({SICK}), is_long=True),
)
