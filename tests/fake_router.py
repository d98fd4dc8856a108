"""A router without a model: it keeps the contract of router.proto, and its tokens are a function of the request.

Owns sequences, steps and frames as a real router shows them to a gateway. Steps run by themselves, or one at a time
while held. Records what gateways asked for, so that tests can look.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio

from collegium.fabric import rpc
from collegium.fabric.errors import Unavailable
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as pb
from collegium.v1 import router_pb2_grpc

NextToken = Callable[[Sequence[int], Sequence[int], int, ipb.Sampling], int]
SCORE_TOKENS_PER_STEP = 16


def model(**changes: Any) -> ipb.Model:
    """Describe a model that fits the demo checkpoint's tokenizer."""
    fields: dict[str, Any] = {
        "name": "fake-lm",
        "architecture": "qwen3_moe",
        "vocab_size": 4096,
        "max_model_len": 512,
        "eos_ids": [0],
        "num_moe_layers": 2,
        "num_experts": 8,
        "top_k": 2,
        "dtype": "float32",
    }
    return ipb.Model(**(fields | changes))


def hashed_token(
    prompt_ids: Sequence[int], output_ids: Sequence[int], choice_index: int, sampling: ipb.Sampling
) -> int:
    """Choose by a hash of everything that may count; never an end of sequence."""
    seed = sampling.seed if sampling.temperature > 0 else 0
    choice = choice_index if sampling.temperature > 0 else 0
    key = repr((seed, choice, len(prompt_ids), *prompt_ids, *output_ids))
    return 1 + zlib.crc32(key.encode()) % 4000


def scripted(token_ids: Sequence[int], then: int = 0) -> NextToken:
    """Give the tokens of a script whatever the request, then one token for ever (by default the end of sequence)."""

    def next_token(_: Sequence[int], output_ids: Sequence[int], __: int, ___: ipb.Sampling) -> int:
        return token_ids[len(output_ids)] if len(output_ids) < len(token_ids) else then

    return next_token


def expected(prompt_ids: Sequence[int], num_tokens: int, choice_index: int = 0, **sampling: Any) -> list[int]:
    """Give what hashed_token grows from a prompt."""
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(hashed_token(prompt_ids, output, choice_index, ipb.Sampling(**sampling)))
    return output


class _Sequence:
    def __init__(self, submission: pb.Submission, start: pb.ChoiceStart) -> None:
        self.submission = submission
        self.choice_index = start.choice_index
        self.output_ids = list(start.output_ids)
        self.is_paused = False
        self.num_scored = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.submission.request_id, self.choice_index


class FakeRouter(router_pb2_grpc.RouterServicer):
    """One router. All of its state may be read and changed by the test that owns its loop."""

    def __init__(self, served: ipb.Model | None = None, next_token: NextToken = hashed_token) -> None:
        self.model = served or model()
        self.next_token = next_token
        self.router_id = "r1"
        self.is_loading = False
        self.submissions: list[pb.Submission] = []
        self.cancellations: list[pb.SequenceRef] = []
        self.pauses: list[pb.SequenceRef] = []
        self.unpauses: list[pb.SequenceRef] = []
        self.gateways: list[str] = []
        self.failure: pb.Failure | None = None  # given to every sequence at its next step
        self.sequences: dict[tuple[str, int], _Sequence] = {}
        self.changed = asyncio.Event()
        self.num_steps = 0
        self.tokens_per_step = 1
        self._num_allowed: int | None = None  # steps that may run; None: any number
        self._wake = asyncio.Event()
        self._server: rpc.Server | None = None

    async def start(self, bind: str = "127.0.0.1:0") -> str:
        """Listen; gives the address."""
        self._server = rpc.Server("fake-router", services=("collegium.v1.Router",))
        router_pb2_grpc.add_RouterServicer_to_server(self, self._server.grpc)
        address = await self._server.start(bind)
        self._server.set_serving(True)
        return address

    async def stop(self, grace_s: float = 0) -> None:
        """End as a killed router does: every stream breaks."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    def set_serving(self, is_serving: bool) -> None:
        """Change what its health says."""
        assert self._server is not None
        self._server.set_serving(is_serving)

    def hold(self) -> None:
        """Run no step from now on but by step()."""
        self._num_allowed = 0

    def step(self, count: int = 1) -> None:
        """Let some steps run."""
        self._num_allowed = (self._num_allowed or 0) + count
        self._wake.set()

    def release(self) -> None:
        """Let steps run by themselves again."""
        self._num_allowed = None
        self._wake.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, looking whenever a frame came or a step ran."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def Describe(
        self, request: pb.DescribeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.DescribeResponse:
        if self.is_loading:
            raise Unavailable("the model is loading", reason="LOADING", retry_after_s=0.1)
        return pb.DescribeResponse(router_id=self.router_id, model=self.model)

    async def Attach(
        self, requests: AsyncIterator[pb.AttachRequest], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.AttachResponse]:
        if self.is_loading:
            raise Unavailable("the model is loading", reason="LOADING", retry_after_s=0.1)
        mine: dict[tuple[str, int], _Sequence] = {}
        reader = asyncio.create_task(self._read(requests, mine))
        try:
            yield pb.AttachResponse(load=self._load())
            while not reader.done():
                if not self._may_step(mine):
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                frame = self._step(mine)
                self._notify()
                yield frame
                await asyncio.sleep(0)
        finally:
            reader.cancel()
            for key in mine:
                self.sequences.pop(key, None)
            self._notify()

    async def _read(self, requests: AsyncIterator[pb.AttachRequest], mine: dict[tuple[str, int], _Sequence]) -> None:
        try:
            async for frame in requests:
                self._take(frame, mine)
        finally:
            self._wake.set()

    def _take(self, frame: pb.AttachRequest, mine: dict[tuple[str, int], _Sequence]) -> None:
        if frame.gateway_id:
            self.gateways.append(frame.gateway_id)
        for submission in frame.submissions:
            assert submission.prompt_ids
            assert submission.choices
            assert submission.sampling.HasField("seed")
            assert submission.stopping.HasField("max_tokens")
            assert not submission.stopping.stop_strings
            self.submissions.append(submission)
            for start in submission.choices:
                sequence = _Sequence(submission, start)
                assert sequence.key not in self.sequences
                mine[sequence.key] = self.sequences[sequence.key] = sequence
        self.cancellations.extend(frame.cancellations)
        for ref in frame.cancellations:
            for sequence in _named(mine, ref):
                del mine[sequence.key], self.sequences[sequence.key]
        for refs, seen, is_paused in ((frame.pauses, self.pauses, True), (frame.unpauses, self.unpauses, False)):
            seen.extend(refs)
            for ref in refs:
                for sequence in _named(mine, ref):
                    sequence.is_paused = is_paused
        self._wake.set()
        self._notify()

    def _may_step(self, mine: dict[tuple[str, int], _Sequence]) -> bool:
        return self._num_allowed != 0 and any(not sequence.is_paused for sequence in mine.values())

    def _step(self, mine: dict[tuple[str, int], _Sequence]) -> pb.AttachResponse:
        if self._num_allowed:
            self._num_allowed -= 1
        self.num_steps += 1
        response = pb.AttachResponse(step=self.num_steps, load=self._load())
        for sequence in [sequence for sequence in mine.values() if not sequence.is_paused]:
            news = self._score(sequence) if sequence.submission.is_score else self._grow(sequence)
            news.request_id, news.choice_index = sequence.key
            if self.failure is not None:
                news.failure.CopyFrom(self.failure)
            if news.finish_reason or news.HasField("failure"):
                del mine[sequence.key], self.sequences[sequence.key]
            response.news.append(news)
        return response

    def _grow(self, sequence: _Sequence) -> pb.SequenceNews:
        submission, stopping = sequence.submission, sequence.submission.stopping
        news = pb.SequenceNews(cached_prompt_tokens=len(submission.prompt_ids) // 2)
        for _ in range(self.tokens_per_step):
            token_id = self.next_token(
                submission.prompt_ids, sequence.output_ids, sequence.choice_index, submission.sampling
            )
            sequence.output_ids.append(token_id)
            news.token_ids.append(token_id)
            if submission.HasField("num_logprobs"):
                news.logprobs.append(_logprobs(token_id, submission.num_logprobs))
            is_end = token_id in stopping.stop_ids or (token_id in self.model.eos_ids and not stopping.ignore_eos)
            if is_end and len(sequence.output_ids) >= stopping.min_tokens:
                news.finish_reason = ipb.FINISH_REASON_STOP
                news.stop_id = token_id
                break
            if len(sequence.output_ids) >= stopping.max_tokens:
                news.finish_reason = ipb.FINISH_REASON_LENGTH
                break
        return news

    def _score(self, sequence: _Sequence) -> pb.SequenceNews:
        wanted = sequence.submission.prompt_ids[1:]
        part = wanted[sequence.num_scored : sequence.num_scored + SCORE_TOKENS_PER_STEP]
        sequence.num_scored += len(part)
        news = pb.SequenceNews(logprobs=[_logprobs(token_id, 0) for token_id in part])
        if sequence.num_scored == len(wanted):
            news.finish_reason = ipb.FINISH_REASON_LENGTH
        return news

    def _load(self) -> pb.RouterLoad:
        return pb.RouterLoad(num_running=len(self.sequences), free_blocks=100, total_blocks=100)

    def _notify(self) -> None:
        self.changed.set()


def score_of(token_id: int) -> float:
    """Give the log-probability that the fake gives a token."""
    return -0.125 * (token_id % 8)


def _logprobs(token_id: int, num_top: int) -> ipb.TokenLogprobs:
    top_ids = [(token_id + i) % 4096 for i in range(num_top)]
    return ipb.TokenLogprobs(chosen=score_of(token_id), top_ids=top_ids, top=[-0.5 * i for i in range(num_top)])


def _named(mine: dict[tuple[str, int], _Sequence], ref: pb.SequenceRef) -> list[_Sequence]:
    return [
        sequence
        for (request_id, choice_index), sequence in mine.items()
        if request_id == ref.request_id and (not ref.HasField("choice_index") or choice_index == ref.choice_index)
    ]


@asynccontextmanager
async def running(*routers: FakeRouter) -> AsyncIterator[list[str]]:
    """Run routers; gives their addresses."""
    addresses = [await router.start() for router in routers]
    try:
        yield addresses
    finally:
        for router in routers:
            await router.stop()
