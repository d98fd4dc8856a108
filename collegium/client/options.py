"""What a caller may ask for, and how it is written down as a request.

Owns the keywords of generate, complete and score. Checks only what a message cannot carry; the gateway checks the rest.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

from collegium.fabric.errors import InvalidArgument
from collegium.v1 import inference_pb2 as pb

_UINT32 = 2**32 - 1
_UINT64 = 2**64 - 1
_EARLY_STOPPING: Mapping[object, pb.EarlyStopping] = {
    False: pb.EARLY_STOPPING_UNSPECIFIED,
    True: pb.EARLY_STOPPING_ALWAYS,
    "never": pb.EARLY_STOPPING_NEVER,
}


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class GenerateOptions(TypedDict, total=False):
    """Keywords of generate and complete. Absent or None: the default."""

    prompt_ids: Iterable[int] | None  # token ids, instead of a text prompt
    messages: Iterable[Message] | None  # a conversation, instead of a text prompt
    model: str  # name from list_models; empty: the only model
    max_tokens: int | None  # at most this many tokens per choice; None: up to the model's length
    min_tokens: int  # nothing ends a choice before this many tokens
    temperature: float | None  # 0 or None: greedy
    top_k: int | None  # keep the k likeliest tokens
    top_p: float | None  # keep the smallest set of tokens whose probability reaches top_p
    min_p: float | None  # drop tokens below min_p times the likeliest one's probability
    repetition_penalty: float | None  # 1: none
    presence_penalty: float | None  # -2 to 2; 0: none
    frequency_penalty: float | None  # -2 to 2; 0: none
    seed: int | None  # None: the gateway draws one; Stream.seed tells it
    ignore_eos: bool  # go on past end-of-sequence ids
    stop: str | Sequence[str]  # strings that end a choice and are not delivered
    stop_ids: Iterable[int]  # ids that end a choice
    n: int  # number of independent choices, or of the best that a beam search finds
    num_beams: int  # above 1: beam search, by the rules of transformers' generate; nothing comes before its end
    length_penalty: (
        float | None
    )  # of beam search: a score is the sum of log-probabilities over the length to this power
    early_stopping: bool | Literal["never"]  # of beam search, as transformers has it
    no_repeat_ngram_size: int  # no run of so many tokens comes twice; 0: any may
    source_language: str  # of a model with an encoder: the prompt's, such as "eng_Latn"; empty: the model's own
    target_language: str  # the answer's; empty: as the model's files say, or none
    logprobs: int | None  # 0: of the chosen tokens; n: of the n likeliest as well
    timeout_s: float | None  # for the whole call, retries included; None: the client's
    request_id: str | None  # None: a UUID is made


_KEYWORDS = frozenset(GenerateOptions.__annotations__)
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def generate_request(prompt: str | None, options: GenerateOptions) -> pb.GenerateRequest:
    """Write a Generate request down. InvalidArgument for values that no request can carry."""
    unknown = sorted(set(options) - _KEYWORDS)
    if unknown:
        raise TypeError(f"generate has no option {unknown[0]!r}; it has {', '.join(sorted(_KEYWORDS))}")
    request = pb.GenerateRequest(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        model=options.get("model", ""),
        sampling=sampling_of(options),
        stopping=stopping_of(options),
        num_choices=uint("n", options.get("n", 1)),
        source_language=options.get("source_language", ""),
        target_language=options.get("target_language", ""),
        beam_search=beam_search_of(options),
    )
    if request.num_choices == 0:
        raise InvalidArgument("0 choices are no answer", field="n", remedy="give at least 1")
    logprobs = options.get("logprobs")
    if logprobs is not None:
        request.num_logprobs = uint("logprobs", logprobs)
    prompt_ids, messages = options.get("prompt_ids"), options.get("messages")
    if sum(form is not None for form in (prompt, prompt_ids, messages)) != 1:
        raise InvalidArgument(
            "exactly one form of prompt is needed", field="prompt", remedy="give one of prompt, prompt_ids and messages"
        )
    if prompt is not None:
        request.text = _utf8("prompt", prompt)
    elif prompt_ids is not None:
        request.token_ids.ids.extend(uint("prompt_ids", token_id) for token_id in prompt_ids)
        request.token_ids.SetInParent()
    else:
        request.chat.messages.extend(_message(entry) for entry in messages or ())
        request.chat.SetInParent()
    return request


class ScoreOptions(TypedDict, total=False):
    """Keywords of score. Absent or None: the default."""

    prompt_ids: Iterable[int] | None  # instead of a text
    model: str  # name from list_models; empty: the only model
    target: str | None  # of a model with an encoder: the answer that is scored, the prompt being its source
    target_ids: Iterable[int] | None  # instead of a text, as generate gives them
    source_language: str  # as in GenerateOptions
    target_language: str  # as in GenerateOptions; its code has 0 where it begins the target
    timeout_s: float | None  # for the whole call, retries included; None: the client's


_SCORE_KEYWORDS = frozenset(ScoreOptions.__annotations__)


def score_request(text: str | None, options: ScoreOptions) -> pb.ScoreRequest:
    """Write a Score request down."""
    if unknown := sorted(set(options) - _SCORE_KEYWORDS):
        raise TypeError(f"score has no option {unknown[0]!r}; it has {', '.join(sorted(_SCORE_KEYWORDS))}")
    prompt_ids, target, target_ids = (options.get(name) for name in ("prompt_ids", "target", "target_ids"))
    if (text is None) == (prompt_ids is None):
        raise InvalidArgument(
            "exactly one form of input is needed", field="prompt", remedy="give one of prompt and prompt_ids"
        )
    if target is not None and target_ids is not None:
        raise InvalidArgument(
            "there are two targets", field="target_text", remedy="give one of target (a text) and target_ids"
        )
    request = pb.ScoreRequest(
        model=options.get("model", ""),
        source_language=options.get("source_language", ""),
        target_language=options.get("target_language", ""),
    )
    if text is not None:
        request.text = _utf8("prompt", text)
    else:
        request.token_ids.ids.extend(uint("prompt_ids", token_id) for token_id in prompt_ids or ())
        request.token_ids.SetInParent()
    if target is not None:
        request.target_text = _utf8("target_text", target)
    elif target_ids is not None:
        request.target_ids.ids.extend(uint("target_ids", token_id) for token_id in target_ids)
        request.target_ids.SetInParent()
    return request


def sampling_of(options: GenerateOptions) -> pb.Sampling:
    """Write down how tokens are chosen."""
    values: Mapping[str, object] = options
    sampling = pb.Sampling()
    for name in _NUMBERS:
        value = values.get(name)
        if value is not None:
            setattr(sampling, name, value)
    top_k, seed = options.get("top_k"), options.get("seed")
    sampling.no_repeat_ngram_size = uint("no_repeat_ngram_size", options.get("no_repeat_ngram_size", 0))
    if top_k is not None:
        sampling.top_k = uint("top_k", top_k)
    if seed is not None:
        sampling.seed = uint("seed", seed, _UINT64)
    return sampling


def beam_search_of(options: GenerateOptions) -> pb.BeamSearch | None:
    """Write down how outputs are searched; None where they are drawn."""
    num_beams = uint("num_beams", options.get("num_beams", 1))
    if num_beams == 0:
        raise InvalidArgument("0 beams find nothing", field="num_beams", remedy="give at least 1")
    if num_beams == 1:
        return None
    early = options.get("early_stopping", False)
    if early not in _EARLY_STOPPING:
        raise InvalidArgument(f"{early!r} is unknown", field="early_stopping", remedy='give True, False or "never"')
    search = pb.BeamSearch(num_beams=num_beams, early_stopping=_EARLY_STOPPING[early])
    length_penalty = options.get("length_penalty")
    if length_penalty is not None:
        search.length_penalty = length_penalty
    return search


def stopping_of(options: GenerateOptions) -> pb.Stopping:
    """Write down when choices end."""
    stop = options.get("stop", ())
    stopping = pb.Stopping(
        min_tokens=uint("min_tokens", options.get("min_tokens", 0)),
        ignore_eos=options.get("ignore_eos", False),
        stop_ids=[uint("stop_ids", token_id) for token_id in options.get("stop_ids", ())],
        stop_strings=[_utf8("stop", text) for text in ((stop,) if isinstance(stop, str) else stop)],
    )
    max_tokens = options.get("max_tokens")
    if max_tokens is not None:
        stopping.max_tokens = uint("max_tokens", max_tokens)
    return stopping


def _message(entry: Message) -> pb.ChatMessage:
    return pb.ChatMessage(role=entry["role"], content=_utf8("messages", entry["content"]))


def uint(field: str, value: int, largest: int = _UINT32) -> int:
    """Return a whole number of a message; InvalidArgument if the message cannot hold it."""
    if not 0 <= value <= largest:
        raise InvalidArgument(f"{value} is out of range", field=field, remedy=f"give 0 to {largest}")
    return value


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"the text cannot be written as UTF-8: {error.reason} at character {error.start}",
            field=field,
            remedy="remove lone surrogates, or send prompt_ids",
            reason="BROKEN_UTF8",
        ) from None
