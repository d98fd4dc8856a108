"""collegium.v1.Inference: check, admit, make token ids, hand to the relay, write.

Owns the register of running requests, which Cancel looks into. Everything else is in the parts that it is given. A
request is admitted before anything is done for it that costs more than reading it.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import MappingProxyType
from typing import Any

from grpc import aio

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from gateway import fields, requests
from gateway.account import SCORE, TRANSLATE, Account, Accounts
from gateway.admission import Admission, Ticket
from gateway.auth import caller_of
from gateway.choice import Choice
from gateway.cluster import ClusterView
from gateway.counts import Counts
from gateway.generation import Generation
from gateway.pool import RouterPool
from gateway.relay import Relay, Write
from gateway.requests import Accepted, Asked, Progress
from gateway.restore import restore
from gateway.scoring import Scoring
from gateway.stops import StopStrings
from gateway.texts import Texts
from gateway.tokenizer import Tokenizer
from gateway.translating import translate

Context = aio.ServicerContext[Any, Any]
_NOTHING: Mapping[int, Progress] = MappingProxyType({})


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """The public service of a gateway; owned by the event loop's thread."""

    def __init__(
        self,
        *,
        pool: RouterPool,
        admission: Admission,
        relay: Relay,
        tokenizer: Tokenizer | None,
        texts: Texts,
        cluster: ClusterView,
        counts: Counts,
        has_keys: bool = False,
    ) -> None:
        """has_keys: whether callers are known by API keys."""
        self._pool = pool
        self._admission = admission
        self._relay = relay
        self._tokenizer = tokenizer
        self._texts = texts
        self._cluster = cluster
        self._counts = counts
        self._has_keys = has_keys
        self._accounts = Accounts(counts, lambda: pool.model_name)
        self._running: defaultdict[str, set[Generation]] = defaultdict(set)

    def running(self, request_id: str = "") -> list[Generation]:
        """Give the requests that run under an id; all of them where it is empty."""
        if request_id:
            return list(self._running.get(request_id, ()))
        return [generation for generations in self._running.values() for generation in generations]

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream a new request."""
        async with self._account(_operation(request), context, request.request_id) as account:
            await self._generate(request, (), context.write, account)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:
        """Stream the rest of a request that began elsewhere."""

        async def write(response: pb.GenerateResponse) -> None:
            await context.write(pb.ResumeResponse(response=response))

        wanted = request.request
        async with self._account(_operation(wanted), context, wanted.request_id) as account:
            if request.progress and not wanted.sampling.HasField("seed"):
                raise InvalidArgument(
                    "without its seed the request would continue differently",
                    field="request.sampling.seed",
                    remedy="give the seed of StreamStart",
                )
            await self._generate(wanted, request.progress, write, account)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        """End a running request: its stream ends well, with FINISH_REASON_CANCELLED."""
        if not fields.check_request_id(request.request_id):
            raise InvalidArgument("no request is named", field="request_id", remedy="give the id of a request")
        running = self.running(request.request_id)
        for generation in running:
            generation.cancel()
        return pb.CancelResponse(was_running=bool(running))

    async def Translate(self, sentences: AsyncIterator[pb.TranslateRequest], context: Context) -> None:
        """Translate the sentences of a stream, each a request of its own."""

        async def serve(request: pb.GenerateRequest, write: Write) -> None:
            async with self._account(TRANSLATE, context) as account:
                await self._generate(request, (), write, account)

        async def tell(response: pb.TranslateResponse) -> None:
            await self._relay.tell(context.write, response)

        await translate(sentences, self._check_translation, serve, tell)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Score a text in one answer."""
        async with self._account(SCORE, context) as account:
            model = self._pool.model
            prompt = requests.check_score(request, model=model, tokenizer=self._tokenizer)
            target, forced_id = requests.check_target(request, model=model, tokenizer=self._tokenizer)
            with self._admission.admitted() as ticket:
                token_ids = await self._texts.ids_of(prompt, max_tokens=model.max_model_len)
                token_ids = requests.check_scored(token_ids, prompt.field, model)
                target_ids: Sequence[int] = ()
                if target is not None:
                    field, most = request.WhichOneof("target") or "target", model.max_model_len - 1
                    target_ids = await self._texts.ids_of(target, max_tokens=most)
                    target_ids = requests.check_scored(target_ids, field, model, most)
                self._queue(ticket, [*token_ids, *target_ids])
                scoring = Scoring(token_ids, target_ids, forced_id)
                response = await self._relay.score(scoring, token_ids, account.arrival)
            self._counts.successes[SCORE] += 1
            return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Name the one model."""
        return pb.ListModelsResponse(models=[self._described()])

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Describe the model."""
        fields.check_model(request.model, self._pool.model)
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
        if self._tokenizer is not None and model.is_encoder_decoder:
            model.languages.extend(self._tokenizer.languages)
        return model

    def _account(self, operation: str, context: Context, request_id: str = "") -> AbstractAsyncContextManager[Account]:
        caller = caller_of(context, has_keys=self._has_keys)
        return self._accounts.of(operation, context.time_remaining(), request_id, caller=caller)

    def _check_translation(self, request: pb.GenerateRequest) -> None:
        model = self._pool.model
        if not model.is_encoder_decoder:
            raise FailedPrecondition(
                f"model {model.name} has no encoder, and translates nothing", remedy="use Generate", reason="NO_ENCODER"
            )
        self._checked(request)

    def _checked(self, request: pb.GenerateRequest) -> Asked:
        return requests.check_generate(
            request,
            model=self._pool.model,
            tokenizer=self._tokenizer,
            draw_seed=lambda: secrets.randbits(63),
            draw_id=lambda: uuid.uuid4().hex,
        )

    async def _generate(
        self, request: pb.GenerateRequest, progress: Sequence[pb.ChoiceProgress], write: Write, account: Account
    ) -> None:
        model = self._pool.model
        asked = self._checked(request)
        with self._admission.admitted(
            num_sequences=asked.num_choices, num_output_tokens=asked.num_output_tokens
        ) as ticket:
            accepted = asked.accept(await self._texts.ids_of(asked.prompt, max_tokens=model.max_model_len))
            given = requests.check_progress(progress, accepted, model)
            choices = await self._choices(accepted, given, model)
            generation = Generation(accepted, choices, model=model.name)
            if not generation.is_finished:  # a resumed stream may have only its end left
                self._queue(ticket, accepted.prompt_ids, given)
            await self._stream(generation, ticket, write, account)

    async def _choices(self, accepted: Accepted, given: Mapping[int, Progress], model: pb.Model) -> list[Choice]:
        begun = () if model.is_encoder_decoder else accepted.prompt_ids  # an answer to a source goes on with nothing
        prompt_end = None if self._tokenizer is None else self._tokenizer.prompt_end(begun)
        stops = StopStrings(accepted.stop_strings)
        choices = [
            Choice(
                index,
                prompt_end=prompt_end,
                stops=stops,
                stop_tokens=accepted.stop_tokens,
                min_tokens=accepted.stopping.min_tokens,
            )
            for index in range(accepted.num_choices)
        ]
        for _ in restore(choices, given, accepted, model):
            await asyncio.sleep(0)
        return choices

    def _queue(self, ticket: Ticket, prompt_ids: Sequence[int], given: Mapping[int, Progress] = _NOTHING) -> None:
        self._admission.queue(ticket, len(prompt_ids) + sum(len(one.token_ids) for one in given.values()))
        self._counts.prompt_tokens += len(prompt_ids)

    async def _stream(self, generation: Generation, ticket: Ticket, write: Write, account: Account) -> None:
        request_id = generation.accepted.request_id
        account.begin(generation, self._pool.model.name)
        self._running[request_id].add(generation)
        try:
            on_first_token = partial(self._admission.start, ticket)
            await self._relay.generate(generation, write, account.arrival, on_first_token)
        finally:
            self._running[request_id].discard(generation)
            if not self._running[request_id]:
                del self._running[request_id]
        self._counts.successes.update(generation.finish_reasons)


def _operation(request: pb.GenerateRequest) -> str:
    return "chat" if request.HasField("chat") else "text_completion"
