"""A rolling restart as Kubernetes does it, one service after another under load: SIGTERM, wait, start, wait for ready.

The pods keep their ports. Every answer is held against the reference, or against what was answered before anything was
restarted; tests go on from each other's clusters, in any order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
import torch

from collegium.cli.cluster import ClusterSpec
from collegium.client import Client
from collegium.fabric.hosts import host_identity
from collegium.link.base import RouterLink
from collegium.link.connect import connect
from collegium.link.frame import Dispatch, Status
from collegium.model.manifest import ensure_manifest, load_manifest
from collegium.v1 import expert_pb2, expert_pb2_grpc
from tests.oracle import Oracle
from tests.pods import LIMIT_S, Pod, Pods, running_pods
from tests.redis_server import RedisServer

MAX_TOKENS = 100
MANY_TOKENS = 900
NUM_LANES = 5
LENGTHS = (8, 13, 21, 30)  # too short for gateways to send them where they were before: both routers have work
DRAIN_S = 600.0  # longer than any test may take: who ends before has ended because nothing was left to do
HASTY = "router-1"  # has no time to drain
SECOND = pytest.mark.soak  # restarts of a role's second pod: `make soak` has them all
BOTH = ("0", pytest.param("1", marks=SECOND))
PAUSE_S = 0.2
REPLAYED = "collegium_requests_replayed_total"
RETRIED = "collegium_dispatch_retries_total"
DISPATCHES = "collegium_worker_dispatches_total"
LEADS = "collegium_balancer_is_leader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, a seed (None: greedy), and what it is answered by an undisturbed cluster."""

    prompt_ids: list[int]
    seed: int | None
    token_ids: list[int]


def ask(client: Client, prompt_ids: list[int], seed: int | None) -> list[int]:
    """Stream one answer."""
    tokens: list[int] = []
    with client.generate(
        prompt_ids=prompt_ids,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        temperature=0.0 if seed is None else 0.9,
        seed=seed or 0,
    ) as stream:
        for chunk in stream:
            tokens.extend(chunk.token_ids)
    return tokens


def drain_of(pod: Pod) -> tuple[str, ...]:
    """Say how long a pod may drain."""
    return () if pod.role == "balancer" else ("--drain-s", "0" if pod.name == HASTY else str(DRAIN_S))


class Load:
    """Requests that stream without end, over both gateways, each answer held against what it must be."""

    def __init__(self, targets: list[str], questions: list[Question]) -> None:
        self._targets, self._questions = targets, questions
        self._stopping = threading.Event()
        self._is_full = threading.Event()
        self._is_full.set()
        self._changed = threading.Condition()
        self._num_done = 0
        self._pool = ThreadPoolExecutor(NUM_LANES)
        self._lanes = [self._pool.submit(self._run, lane) for lane in range(NUM_LANES)]

    def _run(self, lane: int) -> None:
        number = lane
        with Client(self._targets, timeout_s=2 * LIMIT_S) as client:
            while not self._stopping.is_set():
                question = self._questions[number % len(self._questions)]
                assert ask(client, question.prompt_ids, question.seed) == question.token_ids
                number += 1
                with self._changed:
                    self._num_done += 1
                    self._changed.notify_all()
                self._is_full.wait(None if lane else PAUSE_S)

    def check(self) -> None:
        """Raise what a lane has failed with, if one has."""
        for lane in self._lanes:
            if lane.done():
                lane.result()

    @contextmanager
    def light(self) -> Iterator[None]:
        """Inside the context one lane alone goes on, with pauses: what starts beside it needs the cores."""
        self._is_full.clear()
        try:
            yield
        finally:
            self._is_full.set()

    def go_on(self, num_requests: int = NUM_LANES) -> None:
        """Let some more requests come to their ends."""
        deadline_s = time.monotonic() + LIMIT_S
        with self._changed:
            wanted = self._num_done + num_requests
            while self._num_done < wanted:
                self.check()
                assert time.monotonic() < deadline_s, "requests do not come to their ends"
                self._changed.wait(1.0)
        self.check()

    def close(self) -> None:
        """Let what runs come to its end; raises what a lane has failed with."""
        self._stopping.set()
        self._is_full.set()
        for lane in self._lanes:
            lane.result(timeout=2 * LIMIT_S)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def spec(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> ClusterSpec:
    checkpoint = oracle.checkpoint("qwen3_moe")
    return ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path_factory.mktemp("m") / "manifest.json"),
        num_workers=2,
        num_routers=2,
        num_gateways=2,
        num_balancers=2,
        log_level="info",
        # A worker that is slow to answer on a busy machine is not to be taken for a lost one.
        flags={"router": ("--expert-timeout-s", str(LIMIT_S)), "balancer": ("--lease-ttl-ms", "60000")},
    )


@pytest.fixture(scope="module")
def pods(spec: ClusterSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    redis = RedisServer(tmp_path_factory.mktemp("r"))
    redis.start()
    try:
        with running_pods(spec, redis.url, drain_of) as running:
            yield running
    finally:
        redis.kill()


@pytest.fixture(scope="module")
def load(pods: Pods, spec: ClusterSpec, oracle: Oracle) -> Iterator[Load]:
    references = oracle.choose_prompts(spec.model, 4, MAX_TOKENS, lengths=LENGTHS)
    targets = [pod.address for pod in pods.of("gateway")]
    questions = [Question(prompt_ids=r.prompt_ids, seed=None, token_ids=r.token_ids) for r in references]
    with Client(targets, timeout_s=LIMIT_S) as client:
        for seed, reference in enumerate(references, 1):
            tokens = ask(client, reference.prompt_ids, seed)
            questions.append(Question(prompt_ids=reference.prompt_ids, seed=seed, token_ids=tokens))
    running = Load(targets, questions)
    yield running
    running.close()
    for pod in pods.of("gateway"):
        failed = [series for series in pod.counters() if series.startswith("collegium_request_failure_total")]
        assert not failed, f"{pod.name} counted {failed}"


def start_again(pod: Pod, load: Load) -> None:
    """Start a pod that has ended, wait until it is ready and has its share of the work, and a while longer."""
    with load.light():
        pod.start(*drain_of(pod))
        pod.wait_until_serving()
    match pod.role:
        case "worker":
            pod.wait_until(lambda: pod.counter(DISPATCHES) > 0, "rows for the worker")
        case "router":
            pod.wait_until(lambda: pod.counter("collegium_sampled_tokens_total") > 0, "requests for the router")
        case "gateway":
            done = 'collegium_request_success_total{finished_reason="length"}'
            pod.wait_until(lambda: pod.counter(done) > 0, "requests for the gateway")
        case _:
            pod.wait_until(lambda: pod.counter('collegium_members{role="worker"}') == 2, "news of all workers")
    load.go_on()


def wait_until_attached(pods: Pods, num_routers: int) -> None:
    """Wait until both gateways have so many routers, and have said of the others that they lost them."""
    for pod in pods.of("gateway"):
        pod.wait_until(
            lambda pod=pod: pod.counter("collegium_routers_attached") == num_routers, f"{num_routers} routers"
        )


@pytest.mark.parametrize("turn", ["the first", pytest.param("its successor", marks=SECOND)])
def test_when_the_leading_balancer_ends_the_other_one_leads(pods: Pods, load: Load, turn: str) -> None:
    (leader,) = [pod for pod in pods.of("balancer") if pod.counter(LEADS)]
    (other,) = [pod for pod in pods.of("balancer") if pod is not leader]
    leader.terminate()
    assert leader.wait_for_end() == 0
    other.wait_until(lambda: other.counter(LEADS) == 1, f"the lead after {turn} went")
    load.go_on()
    start_again(leader, load)
    assert other.counter(LEADS) == 1


@contextmanager
def own_link(pod: Pod, spec: ClusterSpec) -> Iterator[RouterLink]:
    """A link of our own to a worker: as long as it is open, a draining worker has somebody to wait for."""
    manifest = load_manifest(spec.manifest)
    promise = promise_link(pod, manifest.digest)
    link = connect(
        promise.transport,
        promise.address,
        link_id=promise.link_id,
        secret=promise.secret,
        dtype=torch.float32,
        d_model=manifest.d_model,
        deadline_s=time.monotonic() + LIMIT_S,
    )
    try:
        yield link
    finally:
        link.close()


def promise_link(pod: Pod, digest: str) -> expert_pb2.OpenLinkResponse:
    """Ask a worker for a link over TCP, as a router on another node does."""
    request = expert_pb2.OpenLinkRequest(
        router_id="test",
        model_digest=digest,
        dtype="float32",
        transports=["tcp"],
        max_rows=8,
        host=host_identity(),
    )
    with grpc.insecure_channel(pod.address) as channel:
        return expert_pb2_grpc.ExpertStub(channel).OpenLink(request, timeout=LIMIT_S)


def dispatch_of_ours(d_model: int) -> Dispatch:
    """One row for the first two experts of the first layer."""
    return Dispatch(
        seq=1,
        layer=0,
        step=1,
        epoch=1,
        deadline_s=time.monotonic() + LIMIT_S,
        experts=np.array([0, 1], np.uint16),
        counts=np.array([1, 1], np.uint16),
        pair_rows=np.array([0, 0], np.uint32),
        pair_weights=np.array([0.5, 0.5], np.float32),
        x=torch.ones(1, d_model),
    )


@pytest.mark.parametrize("number", BOTH)
def test_the_rows_of_a_draining_worker_go_elsewhere_and_what_was_sent_is_answered(
    pods: Pods, load: Load, spec: ClusterSpec, number: str
) -> None:
    worker, manifest = pods[f"worker-{number}"], load_manifest(spec.manifest)
    retried = pods.sum("router", RETRIED)
    with own_link(worker, spec) as link:
        worker.wait_until(lambda: worker.counter("collegium_worker_links") == 3, "the links of both routers and ours")
        worker.terminate()
        worker.wait_until(lambda: worker.counter("collegium_worker_links") == 1, "the end of both routers' links")
        assert not worker.is_serving()
        with pytest.raises(grpc.RpcError) as refusal:
            promise_link(worker, manifest.digest)
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        computed = worker.counter(DISPATCHES)
        load.go_on()
        assert worker.counter(DISPATCHES) == computed
        link.send(dispatch_of_ours(manifest.d_model))
        reply = link.receive(1, time.monotonic() + LIMIT_S)
        assert reply.status == Status.OK
        worker.wait_until(lambda: worker.counter(DISPATCHES) == computed + 1, "the count of our dispatch")
    assert worker.wait_for_end() == 0
    load.go_on()
    assert pods.sum("router", RETRIED) == retried
    start_again(worker, load)


def test_a_draining_router_finishes_its_sequences(pods: Pods, load: Load) -> None:
    router = pods["router-0"]
    wait_until_attached(pods, 2)
    replayed = pods.sum("gateway", REPLAYED)
    router.wait_until(lambda: router.counter("collegium_num_requests_running") >= 2, "sequences to finish")
    router.terminate()
    assert router.wait_for_end() == 0
    wait_until_attached(pods, 1)
    load.go_on()
    assert pods.sum("gateway", REPLAYED) == replayed
    start_again(router, load)


@SECOND
def test_what_a_router_has_no_time_to_finish_is_replayed_on_another_one(pods: Pods, load: Load) -> None:
    router = pods[HASTY]
    wait_until_attached(pods, 2)
    replayed = pods.sum("gateway", REPLAYED)
    router.wait_until(lambda: router.counter("collegium_num_requests_running") >= 2, "sequences to leave behind")
    router.terminate()
    assert router.wait_for_end() == 0
    wait_until_attached(pods, 1)
    assert pods.sum("gateway", REPLAYED) > replayed
    load.go_on()
    start_again(router, load)


@pytest.mark.parametrize("number", BOTH)
def test_a_draining_gateway_fails_no_request(pods: Pods, load: Load, number: str) -> None:
    gateway = pods[f"gateway-{number}"]
    gateway.wait_until(lambda: gateway.counter("collegium_routers_attached") == 2, "both routers")
    # Of this gateway alone, so that nobody else can take the stream up, and long enough to outlive the signal.
    with (
        Client(gateway.address, timeout_s=2 * LIMIT_S) as client,
        client.generate(prompt_ids=[5, 6, 7], max_tokens=MANY_TOKENS, ignore_eos=True) as stream,
    ):
        tokens = list(next(stream).token_ids)
        gateway.terminate()
        for chunk in stream:
            tokens.extend(chunk.token_ids)
    assert len(tokens) == MANY_TOKENS
    assert gateway.wait_for_end() == 0
    load.go_on()
    start_again(gateway, load)
