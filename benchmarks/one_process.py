"""The whole data path in one process: engine, links and workers, without gRPC, over unix sockets.

Owns OneProcess. It is what golden tests run in bulk and what the serving benchmark calls `inproc`. Everything that
computes is the services' own code; only the processes are missing.
"""

import queue
import secrets
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch

from collegium.fabric.byte_size import MemoryBudget
from collegium.link.base import ExpectedLink, RouterLink
from collegium.link.connect import connect
from collegium.link.frame import SECRET_BYTES
from collegium.link.tcp_port import TcpPort
from collegium.model.manifest import build_manifest
from collegium.model.placement import LayerSize, Worker, plan_homes
from collegium.model.sampling import SamplingParams, TokenLogprobs
from expert_svc.buffer import ExpertBuffer
from expert_svc.compute import ComputeLoop
from expert_svc.memory import make_buffer, make_source
from expert_svc.tiers import Source
from router_svc.beams import BeamOptions, BeamSearch
from router_svc.engine import Engine
from router_svc.expert_calls import ExpertCalls
from router_svc.foresight import Foresight
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.model_loader import load_router_model
from router_svc.news import Load, News
from router_svc.router_model import RouterModel
from router_svc.sequence import Sequence, StopRules
from router_svc.token_memory import TokenMemory
from router_svc.unsafe_routing import UnsafeRouting

_OWNER = 1


@dataclass(slots=True, kw_only=True)
class Request:
    """One request: what to continue and how."""

    prompt_ids: Seq[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_choices: int = 1
    num_logprobs: int | None = None
    after_tokens: int = 0  # submitted once all earlier requests together have so many tokens
    is_score: bool = False
    source_ids: Seq[int] = ()  # of a model with an encoder; the prompt is its decoder's
    forced: Seq[int] = ()  # what an output begins with
    eos_ids: Seq[int] = ()
    min_tokens: int = 0
    beams: BeamOptions | None = None  # search; num_choices: as many as it returns


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one choice."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    failure: str = ""
    has_ended: bool = False
    score: float | None = None  # of a search


class OneProcess:
    """A model served in this process by `num_workers` worker threads; a context manager."""

    def __init__(
        self,
        model_dir: Path,
        *,
        num_workers: int = 1,
        dtype: torch.dtype = torch.float32,
        kv_tokens: int = 65536,
        max_batch_tokens: int = 512,
        max_num_seqs: int = 128,
        num_threads: int = 1,
        worker_threads: int = 1,
        model: RouterModel | None = None,
        expert_memory: str = "",
        host_memory: str = "",
        policy: str = "ewma",
        num_load_threads: int = 2,
        can_prefetch: bool = True,
        num_hinted_layers: int = 2,
        wrap_source: Callable[[Source], Source] | None = None,
        unsafe_routing: UnsafeRouting | None = None,
        num_micro_batches: int = 0,
        device: torch.device | None = None,
        shares: bool = False,
    ):
        """Load and start. `kv_tokens` bounds the KV cache.

        `model`: one that is loaded already, and that no other instance uses at the same time. The memories and the
        policy are each worker's, as its flags take them. `device`: where slots are, if that is not host memory; a CPU
        stands in for a GPU. `wrap_source` may put something between slots and tiers. `shares`: workers compute shared
        experts.
        """
        manifest = build_manifest(model_dir, shares=shares)
        self.manifest = manifest
        self.model = model or load_router_model(model_dir, dtype, torch.device("cpu"), num_shared=manifest.num_shared)
        num_layers, num_experts = len(manifest.layers), self.model.num_experts
        foresight = unsafe_routing or Foresight(
            self.model.moe_blocks(), top_k=self.model.num_routed, device=self.model.device
        )
        self.calls = ExpertCalls(
            num_layers=num_layers,
            num_experts=num_experts,
            timeout_s=60.0,
            foresight=foresight if can_prefetch else None,
            num_ahead=num_hinted_layers,
            memory=TokenMemory(num_layers=min(num_hinted_layers, num_layers))
            if can_prefetch and unsafe_routing is None and self.model.both is None
            else None,
        )
        self.workers: list[ComputeLoop] = []
        self.buffers: list[ExpertBuffer] = []
        names = [f"worker-{i}" for i in range(num_workers)]
        size = [LayerSize(num_experts=num_experts, expert_bytes=manifest.num_params) for _ in manifest.layers]
        self.placement = plan_homes(size, [Worker(worker_id=name) for name in names])
        self._ports: list[TcpPort] = []
        for name in names:
            budgets = {
                "expert_memory": MemoryBudget.parse(expert_memory),
                "host_memory": MemoryBudget.parse(host_memory),
            }
            source: Source | None = None
            if wrap_source is not None:
                source = wrap_source(make_source(manifest, dtype, **budgets, device=device))
            buffer = make_buffer(
                manifest,
                dtype,
                **budgets,
                policy=policy,
                num_load_threads=num_load_threads,
                can_prefetch=can_prefetch,
                source=source,
                device=device,
            )
            homes = self.placement.experts_of(name)
            buffer.set_homes(homes)
            buffer.warm(homes)
            port = TcpPort(worker_id=name, unix="@")
            loop = ComputeLoop(
                port,
                buffer,
                manifest.form,
                dtype,
                d_model=manifest.d_model,
                num_experts=[num_experts] * num_layers,
                num_threads=worker_threads,
            )
            buffer.on_load(port.wake)
            loop.start()
            self.workers.append(loop)
            self.buffers.append(buffer)
            self._ports.append(port)
        self.calls.set_placement(self.placement)
        for link_id, (name, port) in enumerate(zip(names, self._ports, strict=True), 1):
            link = self._connect(port, link_id, max_batch_tokens, dtype)
            self.calls.add_link(name, link, wants_hints=self.buffers[link_id - 1].can_prefetch)
        self._news: queue.SimpleQueue[list[tuple[News, bool]]] = queue.SimpleQueue()
        self.engine = Engine(
            self.model,
            self.calls,
            self._deliver,
            num_blocks=-(-kv_tokens // BLOCK_TOKENS),
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            num_threads=num_threads,
            unsafe_routing=unsafe_routing,
            num_micro_batches=num_micro_batches,
        )
        self.engine.commands.attach(_OWNER)
        self.engine.start()
        self._num_requests = 0

    def __enter__(self) -> "OneProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every thread."""
        self.engine.stop()
        self.calls.close()
        for worker in self.workers:
            worker.stop()
        for buffer in self.buffers:
            buffer.close()

    def run(self, requests: Seq[Request], timeout_s: float = 300.0) -> list[list[Answer]]:
        """Serve requests to their ends: answers[request][choice]. Raises TimeoutError."""
        answers = [[Answer() for _ in range(r.num_choices)] for r in requests]
        index: dict[str, int] = {}
        waiting = list(enumerate(requests))
        num_tokens = 0
        until = time.monotonic() + timeout_s
        while any(not a.has_ended for choices in answers for a in choices):
            while waiting and (waiting[0][1].after_tokens <= num_tokens or _all_ended(answers, index)):
                number, request = waiting.pop(0)
                index[self._submit(request)] = number
            for item, is_last in self._next(until):
                answer = answers[index[item.sequence.request_id]][item.sequence.choice_index]
                now = time.monotonic()
                answer.token_ids += item.token_ids
                answer.logprobs += item.logprobs
                answer.arrived_s += [now] * len(item.token_ids)
                num_tokens += len(item.token_ids)
                if item.failure is not None:
                    answer.failure = f"{item.failure.code}: {item.failure.message}"
                answer.has_ended |= is_last
                answer.score = item.sequence.score
        return answers

    def _next(self, until: float) -> Iterator[tuple[News, bool]]:
        try:
            yield from self._news.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("requests did not end in time") from None

    def _submit(self, request: Request) -> str:
        self._num_requests += 1
        request_id = f"request-{self._num_requests}"
        sequences: list[Sequence] = []
        for choice in range(request.num_choices):
            sequences.append(
                Sequence(
                    owner=_OWNER,
                    request_id=request_id,
                    choice_index=choice,
                    prompt_ids=list(request.prompt_ids),
                    sampling=request.sampling,
                    source_ids=list(request.source_ids),
                    rules=StopRules(
                        max_tokens=request.max_tokens,
                        min_tokens=request.min_tokens,
                        eos_ids=frozenset(request.eos_ids),
                    ),
                    num_logprobs=request.num_logprobs,
                    is_score=request.is_score,
                    leader=sequences[0] if sequences else None,
                )
            )
            for token in request.forced:
                sequences[-1].force(token)
        if request.beams is not None:
            sequences[0].beams = BeamSearch(request.beams, request.forced)
            sequences[0].best = sequences[1:]
            for one in sequences[1:]:
                one.searched_by = sequences[0]
        self.engine.commands.submit(sequences)
        return request_id

    def _deliver(self, owner: int, news: list[News], load: Load, step: int) -> None:
        if news:  # whether a sequence has ended is asked here: the engine may be further on when this is read
            self._news.put([(item, item.failure is not None or item.sequence.has_ended) for item in news])

    def _connect(self, port: TcpPort, link_id: int, max_rows: int, dtype: torch.dtype) -> RouterLink:
        secret = secrets.token_bytes(SECRET_BYTES)
        d_model, until = self.manifest.d_model, time.monotonic() + 10
        port.expect(
            ExpectedLink(
                link_id=link_id,
                secret=secret,
                router_id="router",
                dtype=dtype,
                reply_dtype=dtype,
                d_model=d_model,
                max_rows=max_rows,
                num_credits=4,
                expires_s=until,
            )
        )
        return connect(
            "unix",
            dict(port.addresses)["unix"],
            link_id=link_id,
            secret=secret,
            dtype=dtype,
            d_model=d_model,
            deadline_s=until,
        )


def _all_ended(answers: Seq[Seq[Answer]], index: dict[str, int]) -> bool:
    return all(a.has_ended for number in index.values() for a in answers[number])
