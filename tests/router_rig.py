"""A router's service over an engine of this process, spoken to frame by frame as a gateway would, without gRPC.

Owns the wires between the two: what is sent is a list of frames, what comes back is the outcome of each choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.one_process import OneProcess
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as pb
from router_svc.engine import Engine
from router_svc.service import Outboxes, RouterService

PATIENCE_S = 60.0
MAX_MODEL_LEN = 320


@dataclass(slots=True)
class Outcome:
    """What came of one choice."""

    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    cached_prompt_tokens: int = 0
    finish_reason: int = 0
    failure: pb.Failure | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it finished or failed."""
        return bool(self.finish_reason) or self.failure is not None


Outcomes = dict[tuple[str, int], Outcome]


class RouterRig:
    """One engine, and a service over it for each conversation."""

    def __init__(self, cluster: OneProcess) -> None:
        self.cluster = cluster
        self.model = ipb.Model(
            name="tiny",
            architecture="mixtral",
            vocab_size=cluster.model.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            eos_ids=cluster.model.eos_ids,
        )

    @property
    def engine(self) -> Engine:
        """The engine that all conversations share."""
        return self.cluster.engine

    def submission(self, request_id: str, **changes: Any) -> pb.Submission:
        """Make a submission as a gateway makes it, with some fields changed."""
        fields: dict[str, Any] = {
            "request_id": request_id,
            "prompt_ids": [9, 10, 11],
            "sampling": ipb.Sampling(seed=1),
            "stopping": ipb.Stopping(max_tokens=6, ignore_eos=True),
            "choices": [pb.ChoiceStart(choice_index=0)],
        }
        return pb.Submission(**(fields | changes))

    def talk(self, *frames: pb.AttachRequest, wants: Iterable[tuple[str, int]] | None = None) -> Outcomes:
        """Send frames on one stream, and read it until the wanted choices have ended; by default all submitted."""
        return asyncio.run(self._talk(frames, wants))

    def ask(self, *submissions: pb.Submission) -> Outcomes:
        """Send submissions in one frame and read until they have ended."""
        return self.talk(pb.AttachRequest(submissions=submissions))

    def is_idle(self) -> bool:
        """Whether nothing is left of any request."""
        engine = self.engine
        waited = engine.commands.wait_idle(PATIENCE_S)
        scheduler = engine.scheduler
        requests = engine._requests
        left = [requests._by_key, requests._requests, scheduler._running, scheduler._waiting._lines]
        is_free = scheduler.pool.num_free == scheduler.pool.num_blocks
        return waited and engine.commands.is_served and not any(left) and is_free and requests.num_tokens == 0

    async def _talk(self, frames: Sequence[pb.AttachRequest], wants: Iterable[tuple[str, int]] | None) -> Outcomes:
        outboxes = Outboxes(asyncio.get_running_loop())
        service = RouterService(outboxes)
        service.open(self.engine.commands, self.engine.listeners, self.model, [1])
        self.engine._news.deliver = outboxes.deliver
        is_over = asyncio.Event()

        async def requests() -> AsyncIterator[pb.AttachRequest]:
            for frame in frames:
                yield frame
            await is_over.wait()

        if wants is None:
            wants = [
                (submission.request_id, index)
                for frame in frames
                for submission in frame.submissions
                for index in (list(dict.fromkeys(start.choice_index for start in submission.choices)) or [0])[:64]
            ]
        outcomes: Outcomes = {}
        stream: Any = service.Attach(requests(), None)  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for response in stream:
                    for news in response.news:
                        note(outcomes.setdefault((news.request_id, news.choice_index), Outcome()), news)
                    if all(key in outcomes and outcomes[key].has_ended for key in wants):
                        break
        finally:
            is_over.set()
            await stream.aclose()
            # What was asked of the engine is done before this loop, to which it reports, ends.
            await asyncio.to_thread(self.engine.commands.wait_idle, PATIENCE_S)
        return outcomes


def note(outcome: Outcome, news: pb.SequenceNews) -> None:
    """Add a step's news to an outcome."""
    outcome.token_ids += news.token_ids
    outcome.num_logprobs += len(news.logprobs)
    outcome.cached_prompt_tokens += news.cached_prompt_tokens
    outcome.finish_reason = outcome.finish_reason or news.finish_reason
    if news.HasField("failure"):
        outcome.failure = news.failure


@contextmanager
def router_rig(checkpoint: Path, **options: Any) -> Iterator[RouterRig]:
    """Run an engine with one worker."""
    with OneProcess(checkpoint, **({"num_workers": 1} | options)) as cluster:
        yield RouterRig(cluster)
