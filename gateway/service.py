"""collegium.v1.Inference: check, hand to the relay, write.

Owns the register of running requests, which Cancel looks into. Everything else is in the parts that it is given.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

from grpc import aio

from collegium.fabric.errors import InvalidArgument
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from gateway import validation
from gateway.account import SCORE, Account, Accounts
from gateway.choice import Choice
from gateway.cluster import ClusterView
from gateway.counts import Counts
from gateway.generation import Generation
from gateway.pool import RouterPool
from gateway.relay import Relay, Write
from gateway.restore import restore
from gateway.scoring import Scoring
from gateway.tokenizer import Tokenizer

# Requests of more bytes than this are tokenised outside the loop's thread: about a millisecond of work.
_SMALL_BYTES = 4096
Context = aio.ServicerContext[Any, Any]
T = TypeVar("T")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The public service of a gateway; owned by the event loop's thread."""

    def __init__(
        self, *, pool: RouterPool, relay: Relay, tokenizer: Tokenizer | None, cluster: ClusterView, counts: Counts
    ) -> None:
        self._pool = pool
        self._relay = relay
        self._tokenizer = tokenizer
        self._cluster = cluster
        self._counts = counts
        self._accounts = Accounts(counts, lambda: pool.model_name)
        self._running: defaultdict[str, set[Generation]] = defaultdict(set)

    def running(self, request_id: str = "") -> list[Generation]:
        """Give the requests that run under an id; all of them where it is empty."""
        if request_id:
            return list(self._running.get(request_id, ()))
        return [generation for generations in self._running.values() for generation in generations]

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream a new request."""
        async with self._accounts.of(_operation(request), context.time_remaining(), request.request_id) as account:
            model = self._pool.model
            accepted = await self._check(request.ByteSize(), lambda: self._accept(request, model))
            choices = self._choices(accepted)
            await self._stream(Generation(accepted, choices, model=model.name), context.write, account)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:
        """Stream the rest of a request that began elsewhere."""

        async def write(response: pb.GenerateResponse) -> None:
            await context.write(pb.ResumeResponse(response=response))

        def check() -> Generation:
            if request.progress and not request.request.sampling.HasField("seed"):
                raise InvalidArgument(
                    "without its seed the request would continue differently",
                    field="request.sampling.seed",
                    remedy="give the seed of StreamStart",
                )
            accepted = self._accept(request.request, model)
            choices = self._choices(accepted)
            restore(choices, validation.check_progress(request.progress, accepted, model), accepted, model)
            return Generation(accepted, choices, model=model.name)

        async with self._accounts.of(
            _operation(request.request), context.time_remaining(), request.request.request_id
        ) as account:
            model = self._pool.model
            await self._stream(await self._check(request.ByteSize(), check), write, account)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """End a running request: its stream ends well, with FINISH_REASON_CANCELLED."""
        if not validation.check_request_id(request.request_id):
            raise InvalidArgument("no request is named", field="request_id", remedy="give the id of a request")
        running = self.running(request.request_id)
        for generation in running:
            generation.cancel()
        return pb.CancelResponse(was_running=bool(running))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Score a text in one answer."""
        async with self._accounts.of(SCORE, context.time_remaining()) as account:
            model = self._pool.model
            token_ids = await self._check(
                request.ByteSize(), lambda: validation.check_score(request, model=model, tokenizer=self._tokenizer)
            )
            response = await self._relay.score(Scoring(token_ids), token_ids, account.arrival)
            self._counts.successes[SCORE] += 1
            return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Name the one model."""
        return pb.ListModelsResponse(models=[self._described()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe the model."""
        validation.check_model(request.model, self._pool.model)
        return pb.GetModelResponse(model=self._described())

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        """Describe the cluster as the balancer sees it."""
        return await self._cluster.describe()

    async def ScaleWorkers(self, request: pb.ScaleWorkersRequest, context: Context) -> pb.ScaleWorkersResponse:
        """Say how many workers there should be."""
        return await self._cluster.scale(request.num_workers)

    def _described(self) -> pb.Model:
        model = pb.Model()
        model.CopyFrom(self._pool.model)
        model.has_tokenizer = self._tokenizer is not None
        model.has_chat_template = self._tokenizer is not None and self._tokenizer.has_chat_template
        return model

    def _accept(self, request: pb.GenerateRequest, model: pb.Model) -> validation.Accepted:
        return validation.check_generate(
            request,
            model=model,
            tokenizer=self._tokenizer,
            draw_seed=lambda: secrets.randbits(63),
            draw_id=lambda: uuid.uuid4().hex,
        )

    def _choices(self, accepted: validation.Accepted) -> list[Choice]:
        prompt_end = None if self._tokenizer is None else self._tokenizer.prompt_end(accepted.prompt_ids)
        return [
            Choice(
                index,
                prompt_end=prompt_end,
                stop_strings=accepted.stop_strings,
                stop_tokens=accepted.stop_tokens,
                min_tokens=accepted.stopping.min_tokens,
            )
            for index in range(accepted.num_choices)
        ]

    async def _check(self, num_bytes: int, check: Callable[[], T]) -> T:
        return check() if num_bytes <= _SMALL_BYTES else await asyncio.to_thread(check)

    async def _stream(self, generation: Generation, write: Write, account: Account) -> None:
        request_id = generation.accepted.request_id
        account.begin(generation, self._pool.model.name)
        self._running[request_id].add(generation)
        try:
            await self._relay.generate(generation, write, account.arrival)
        finally:
            self._running[request_id].discard(generation)
            if not self._running[request_id]:
                del self._running[request_id]
        self._counts.successes.update(generation.finish_reasons)


def _operation(request: pb.GenerateRequest) -> str:
    return "chat" if request.HasField("chat") else "text_completion"
