"""Check the fields of a request one by one: their bounds, and the words that refuse them.

Owns both. Pure: a field and the model in, the checked value or an InvalidArgument that names the field and the remedy
out. What a whole request is, requests.py says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from collegium.fabric.errors import InvalidArgument, NotFound
from collegium.v1 import inference_pb2 as pb
from gateway.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_IDS = 256
MAX_REQUEST_ID_CHARS = 128
_MAX_PENALTY = 2.0
MAX_BEAMS = 32
MAX_NGRAM = 64
_MAX_LENGTH_PENALTY = 10.0
# What a search has no use for, and the values that say so.
_DRAWN = (("temperature", 0), ("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
_MOST_NAMED = 256  # languages in a refusal; NLLB has 202


def check_model(name: str, model: pb.Model) -> None:
    """Check that a request means the served model."""
    if name not in ("", model.name):
        raise NotFound(
            f"model {_quoted(name)} is not served here",
            field="model",
            remedy=f"use {_quoted(model.name)}, or leave it empty",
            reason="UNKNOWN_MODEL",
        )


def is_plain_id(request_id: str) -> bool:
    """Say whether a text can be a request's id, or is empty."""
    return len(request_id) <= MAX_REQUEST_ID_CHARS and request_id.isprintable() and request_id.isascii()


def check_request_id(request_id: str) -> str:
    """Check a request's id; empty is allowed."""
    if not is_plain_id(request_id):
        raise InvalidArgument(
            "the id is not plain",
            field="request_id",
            remedy=f"give at most {MAX_REQUEST_ID_CHARS} printable ASCII characters, such as a UUID",
        )
    return request_id


def check_sampling(sampling: pb.Sampling, draw_seed: Callable[[], int]) -> pb.Sampling:
    """Check how tokens are chosen, and give it a seed where it has none."""
    _check_number(sampling, "temperature", "0 for greedy, or more", lambda v: v >= 0)
    _check_number(sampling, "top_p", "more than 0 and at most 1", lambda v: 0 < v <= 1)
    _check_number(sampling, "min_p", "0 to 1", lambda v: 0 <= v <= 1)
    _check_number(sampling, "repetition_penalty", "more than 0; 1 changes nothing", lambda v: v > 0)
    _check_number(sampling, "presence_penalty", "-2 to 2", lambda v: abs(v) <= _MAX_PENALTY)
    _check_number(sampling, "frequency_penalty", "-2 to 2", lambda v: abs(v) <= _MAX_PENALTY)
    if sampling.no_repeat_ngram_size > MAX_NGRAM:
        raise too_large("sampling.no_repeat_ngram_size", sampling.no_repeat_ngram_size, MAX_NGRAM)
    checked = pb.Sampling()
    checked.CopyFrom(sampling)
    if not checked.HasField("seed"):
        checked.seed = draw_seed()
    return checked


def check_stopping(stopping: pb.Stopping, room: int, stop_tokens: Iterable[int] = ()) -> pb.Stopping:
    """Check when choices end; max_tokens becomes at most `room`, stop tokens become ids, stop strings stay here."""
    max_tokens = min(stopping.max_tokens if stopping.HasField("max_tokens") else room, room)
    if stopping.min_tokens > max_tokens:
        raise InvalidArgument(
            f"{stopping.min_tokens} tokens do not fit into {max_tokens}, which max_tokens and the model's length leave",
            field="stopping.min_tokens",
            remedy=f"give at most {max_tokens}",
        )
    return pb.Stopping(
        max_tokens=max_tokens,
        min_tokens=stopping.min_tokens,
        ignore_eos=stopping.ignore_eos,
        stop_ids=dict.fromkeys((*stopping.stop_ids, *stop_tokens)),
    )


def check_stop_ids(stopping: pb.Stopping, model: pb.Model) -> pb.Stopping:
    """Check when choices end, as far as that can be said before the prompt is tokenised."""
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise InvalidArgument("must be at least 1, but is 0", field="stopping.max_tokens", remedy="give at least 1")
    if len(stopping.stop_ids) > MAX_STOP_IDS:
        raise too_large("stopping.stop_ids", len(stopping.stop_ids), MAX_STOP_IDS)
    check_ids(stopping.stop_ids, model, "stopping.stop_ids")
    return stopping


def check_stop_strings(strings: Sequence[bytes], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """Check the strings at which choices end, and return them as text."""
    field = "stopping.stop_strings"
    if strings and tokenizer is None:
        raise InvalidArgument(
            "this model has no tokenizer, so there is no text to find them in", field=field, remedy="use stop_ids"
        )
    if len(strings) > MAX_STOP_STRINGS:
        raise too_large(field, len(strings), MAX_STOP_STRINGS)
    found: list[str] = []
    for position, raw in enumerate(strings):
        name = f"{field}[{position}]"
        if not raw:
            raise InvalidArgument("an empty string would stop at once", field=name, remedy="leave it out")
        if len(raw) > MAX_STOP_STRING_BYTES:
            raise too_large(f"{name} in bytes", len(raw), MAX_STOP_STRING_BYTES)
        found.append(read_utf8(raw, name))
    return tuple(found)


def stop_tokens_of(strings: Sequence[str], tokenizer: Tokenizer | None, model: pb.Model) -> dict[int, str]:
    """Return those of the stop strings that are special tokens, by id."""
    found = {} if tokenizer is None else {tokenizer.special_id(string): string for string in strings}
    return {
        token_id: string for token_id, string in found.items() if token_id is not None and token_id < model.vocab_size
    }


def check_num_logprobs(request: pb.GenerateRequest, model: pb.Model) -> int | None:
    """Check how many log-probabilities are asked for; None if none are."""
    if not request.HasField("num_logprobs"):
        return None
    if request.num_logprobs > MAX_LOGPROBS:
        raise too_large("num_logprobs", request.num_logprobs, MAX_LOGPROBS)
    return min(request.num_logprobs, model.vocab_size)


def check_beams(request: pb.GenerateRequest) -> pb.BeamSearch | None:
    """Check how a request is searched by beams; None if it is not."""
    asked, num_choices = request.beam_search, request.num_choices or 1
    if asked.num_beams > MAX_BEAMS:
        raise too_large("beam_search.num_beams", asked.num_beams, MAX_BEAMS)
    if not (math.isfinite(asked.length_penalty) and abs(asked.length_penalty) <= _MAX_LENGTH_PENALTY):
        raise InvalidArgument(
            f"{asked.length_penalty:g} cannot be used", field="beam_search.length_penalty", remedy="give -10 to 10"
        )
    if asked.early_stopping not in pb.EarlyStopping.values():
        raise InvalidArgument(
            f"{asked.early_stopping} is unknown", field="beam_search.early_stopping", remedy="give 0, 1 or 2"
        )
    if asked.num_beams < 2:
        return None
    if num_choices > asked.num_beams:
        raise InvalidArgument(
            f"{num_choices} choices are more than {asked.num_beams} beams",
            field="num_choices",
            remedy=f"give at most {asked.num_beams}, or more beams",
        )
    for name, neutral in _DRAWN:
        if request.sampling.HasField(name) and getattr(request.sampling, name) != neutral:
            raise InvalidArgument(
                "a beam search draws nothing", field=f"sampling.{name}", remedy="leave it out, or ask for no beams"
            )
    return asked


def check_language(code: str, field: str, tokenizer: Tokenizer | None, model: pb.Model) -> int | None:
    """Check the code of a language, and return its id; None where none is given."""
    if not code:
        return None
    if not model.is_encoder_decoder:
        raise InvalidArgument("this model has no encoder, and translates nothing", field=field, remedy="leave it out")
    known = [] if tokenizer is None else tokenizer.languages
    found = tokenizer.special_id(code) if tokenizer is not None and code in known else None
    if found is None or found >= model.vocab_size:
        told = ", ".join(known[:_MOST_NAMED]) + (f" and {len(known) - _MOST_NAMED} more" * (len(known) > _MOST_NAMED))
        raise InvalidArgument(
            f"{_quoted(code)} is no language of this model",
            field=field,
            remedy=f"give one of {told}" if known else "leave it out: its tokenizer has no codes of languages",
            reason="UNKNOWN_LANGUAGE",
        )
    return found


def check_prompt_ids(token_ids: Sequence[int], model: pb.Model, field: str) -> tuple[int, ...]:
    """Check the ids of a prompt, of which there must be one."""
    if not token_ids:
        raise empty_prompt(field)
    check_ids(token_ids, model, field)
    return tuple(token_ids)


def check_ids(token_ids: Sequence[int], model: pb.Model, field: str) -> None:
    """Check that ids are tokens of the model."""
    if token_ids and max(token_ids) >= model.vocab_size:
        position, token_id = next((i, t) for i, t in enumerate(token_ids) if t >= model.vocab_size)
        raise InvalidArgument(
            f"token id {token_id} at position {position} is out of range",
            field=field,
            remedy=f"give ids from 0 to {model.vocab_size - 1}",
            reason="TOKEN_ID_OUT_OF_RANGE",
        )


def read_utf8(raw: bytes, field: str) -> str:
    """Decode a text, or refuse it by its field."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"the bytes are not UTF-8: {error.reason} at byte {error.start}",
            field=field,
            remedy="encode text as UTF-8, or send token_ids",
            reason="BROKEN_UTF8",
        ) from None


def empty_prompt(field: str) -> InvalidArgument:
    """Make the error that refuses a prompt without tokens."""
    return InvalidArgument("the prompt is empty", field=field, remedy="give at least one token", reason="EMPTY_PROMPT")


def no_tokenizer(field: str) -> InvalidArgument:
    """Make the error that refuses text where the model has no tokenizer."""
    return InvalidArgument("this model has no tokenizer", field=field, remedy="send token_ids", reason="NO_TOKENIZER")


def too_large(field: str, value: int, limit: int) -> InvalidArgument:
    """Make the error that refuses a number above its limit."""
    return InvalidArgument(f"{value} is too many", field=field, remedy=f"give at most {limit}")


def _check_number(sampling: pb.Sampling, name: str, bounds: str, is_within: Callable[[float], bool]) -> None:
    if not sampling.HasField(name):
        return
    value = float(getattr(sampling, name))
    if not (math.isfinite(value) and is_within(value)):
        raise InvalidArgument(f"{value:g} cannot be used", field=f"sampling.{name}", remedy=f"give {bounds}")


def _quoted(name: str) -> str:
    return repr(name if len(name) <= MAX_REQUEST_ID_CHARS else name[:MAX_REQUEST_ID_CHARS] + "...")
