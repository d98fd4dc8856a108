"""What calls give back, as plain values, and how they are read from messages.

Owns the public shapes; protobuf stays behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from collegium.fabric.errors import CollegiumError, from_code
from collegium.v1 import balancer_pb2
from collegium.v1 import inference_pb2 as pb

FinishReason = Literal["stop", "length", "cancelled"]
_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, and (id, log-probability) of the likeliest."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """News of one choice. `text` may lag behind `token_ids` while a character or a stop string is incomplete."""

    choice_index: int
    token_offset: int
    text_offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | None
    score: float | None = None  # of a beam search, once it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took, in tokens."""

    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One whole answer."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_reason: str | None
    score: float | None = None  # of a beam search, once it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All answers to one request; the shortcuts speak of the first."""

    request_id: str
    model: str
    seed: int
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the first choice."""
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the first choice, where asked for."""
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """One of a sentence's. token_ids: language code and end included; logprob: of all of them together, where it was
    asked for or searched by.
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float | None
    finish_reason: FinishReason | None
    score: float | None = None  # of a beam search: logprob over the number of ids to length_penalty


@dataclass(frozen=True, slots=True, kw_only=True)
class Translated:
    """What became of one sentence, the index-th of its call: translations, or the error that it failed by."""

    index: int
    source: str
    translations: tuple[Translation, ...]
    source_tokens: int
    error: CollegiumError | None = None

    @property
    def text(self) -> str:
        """The first translation's text. Raises the error where the sentence failed."""
        if self.error is not None:
            raise self.error
        return self.translations[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Log-probability of each token given those before it. What is given has 0: the first, or a target's language."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    perplexity: float
    num_given: int  # of the first tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model."""

    name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    has_tokenizer: bool
    has_chat_template: bool
    eos_ids: tuple[int, ...]
    num_moe_layers: int
    num_experts: int
    top_k: int
    dtype: str
    is_encoder_decoder: bool = False  # prompts are sources then
    languages: tuple[str, ...] = ()  # codes that its tokenizer knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the cluster."""

    role: str
    member_id: str
    address: str
    state: str
    num_threads: int
    metrics_url: str
    counters: Mapping[str, float]
    joined_unix_ms: int = 0  # when it took its lease; 0: not known
    counted_unix_ms: int = 0  # when its counters were heard; 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """Balancedness over layers: mean over max of the workers' tokens, in (0, 1]; 0 where nothing was counted."""

    min: float
    p50: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How even the load is, and what the balancer last did about it; all zero without a balancer."""

    decode: Evenness
    prefill: Evenness
    num_windows: int
    since_plan_ms: int  # since a plan that moved something came into force; negative: never
    last_decision: str
    moves: int
    moved_bytes: int
    is_leader: bool  # of the balancer that answered
    has_memory: bool
    hottest: tuple[tuple[int, int, float], ...]  # (layer, expert, share of its layer's tokens), hottest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The services behind a gateway."""

    members: tuple[Member, ...]
    placement_epoch: int
    experts_per_worker: Mapping[str, int]
    balance: Balance
    wanted_workers: int  # 0: as many as come
    stale_ms: int  # how long the balancer has not answered; 0: it did


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What followed from asking for a number of workers."""

    num_workers: int  # now, those that retire included
    retiring: tuple[str, ...]


def read_chunk(chunk: pb.Chunk) -> Chunk:
    """Read one chunk of a stream."""
    return Chunk(
        choice_index=chunk.choice_index,
        token_offset=chunk.token_offset,
        text_offset=chunk.text_offset,
        token_ids=tuple(chunk.token_ids),
        text=chunk.text,
        logprobs=tuple(
            TokenLogprobs(chosen=entry.chosen, top=tuple(zip(entry.top_ids, entry.top, strict=True)))
            for entry in chunk.logprobs
        ),
        finish_reason=_FINISH_REASONS.get(chunk.finish_reason),
        stop_reason=chunk.stop_reason or None,
        score=chunk.score if chunk.HasField("score") else None,
    )


def read_usage(usage: pb.Usage) -> Usage:
    """Read the last message's counts."""
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        output_tokens=usage.output_tokens,
    )


def read_translated(response: pb.TranslateResponse, index: int, source: str) -> Translated:
    """Read what became of a sentence."""
    failure = response.failure if response.HasField("failure") else None
    return Translated(
        index=index,
        source=source,
        translations=tuple(
            Translation(
                text=one.text,
                token_ids=tuple(one.token_ids),
                logprob=one.logprob if one.HasField("logprob") else None,
                finish_reason=_FINISH_REASONS.get(one.finish_reason),
                score=one.score if one.HasField("score") else None,
            )
            for one in response.translations
        ),
        source_tokens=response.source_tokens,
        error=None if failure is None else from_code(failure.code, failure.message, failure.reason),
    )


def read_score(response: pb.ScoreResponse) -> Score:
    """Read a score."""
    return Score(
        token_ids=tuple(response.token_ids),
        logprobs=tuple(response.logprobs),
        perplexity=response.perplexity,
        num_given=response.num_given,
    )


def read_model(model: pb.Model) -> Model:
    """Read a model's description."""
    return Model(
        name=model.name,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        is_encoder_decoder=model.is_encoder_decoder,
        languages=tuple(model.languages),
        has_tokenizer=model.has_tokenizer,
        has_chat_template=model.has_chat_template,
        eos_ids=tuple(model.eos_ids),
        num_moe_layers=model.num_moe_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        dtype=model.dtype,
    )


def read_cluster(response: pb.GetClusterResponse) -> Cluster:
    """Read a cluster's description."""
    members = tuple(
        Member(
            role=member.role,
            member_id=member.member_id,
            address=member.address,
            state=member.state,
            num_threads=member.num_threads,
            metrics_url=member.metrics_url,
            counters=dict(member.counters),
            joined_unix_ms=member.joined_unix_ms,
            counted_unix_ms=member.counted_unix_ms,
        )
        for member in response.members
    )
    return Cluster(
        members=members,
        placement_epoch=response.placement_epoch,
        experts_per_worker=dict(response.experts_per_worker),
        balance=read_balance(response.balance),
        wanted_workers=response.wanted_workers,
        stale_ms=response.stale_ms,
    )


def read_balance(balance: balancer_pb2.Balance) -> Balance:
    """Read how even the load is."""
    decode, prefill = (Evenness(min=e.min, p50=e.p50, mean=e.mean) for e in (balance.decode, balance.prefill))
    return Balance(
        decode=decode,
        prefill=prefill,
        num_windows=balance.num_windows,
        since_plan_ms=balance.since_plan_ms,
        last_decision=balance.last_decision,
        moves=balance.moves,
        moved_bytes=balance.moved_bytes,
        is_leader=balance.is_leader,
        has_memory=balance.has_memory,
        hottest=tuple((one.layer, one.expert, one.share) for one in balance.hottest),
    )


def read_scaling(response: pb.ScaleWorkersResponse) -> Scaling:
    """Read what follows from scaling."""
    return Scaling(num_workers=response.num_workers, retiring=tuple(response.retiring))


def join_chunks(chunks: Iterable[Chunk], num_choices: int) -> tuple[Choice, ...]:
    """Put the chunks of a whole stream together, by choice."""
    of_choice: dict[int, list[Chunk]] = {index: [] for index in range(num_choices)}
    for chunk in chunks:
        of_choice[chunk.choice_index].append(chunk)
    return tuple(
        Choice(
            index=index,
            token_ids=tuple(token_id for chunk in parts for token_id in chunk.token_ids),
            text="".join(chunk.text for chunk in parts),
            logprobs=tuple(entry for chunk in parts for entry in chunk.logprobs),
            finish_reason=parts[-1].finish_reason if parts else None,
            stop_reason=parts[-1].stop_reason if parts else None,
            score=parts[-1].score if parts else None,
        )
        for index, parts in of_choice.items()
    )
