"""Check every field of a request before anything else sees it, and give it the form that routers take.

Owns the bounds and the words that refuse. Pure: a request and the model in, an Asked or an error that names the field
and the remedy out. What costs more than reading the request is left to others: Asked.prompt says what is to be rendered
and tokenised, and accept() takes the token ids. A router may trust what passed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from collegium.fabric.errors import InvalidArgument, NotFound
from collegium.v1 import inference_pb2 as pb
from gateway.tokenizer import Tokenizer

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_IDS = 256
MAX_MESSAGES = 16_384
MAX_ROLE_CHARS = 128
MAX_REQUEST_ID_CHARS = 128
_MAX_PENALTY = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it was given, in one of three forms. field: the request's name of that form."""

    field: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # (role, content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request with nothing wrong in it so far; its prompt has no token ids yet."""

    request_id: str
    prompt: Prompt
    sampling: pb.Sampling
    stopping: pb.Stopping
    stop_strings: tuple[str, ...]
    stop_tokens: Mapping[int, str]
    num_choices: int
    num_logprobs: int | None
    model: pb.Model

    @property
    def num_output_tokens(self) -> int:
        """Most tokens that all choices together may grow to."""
        room = self.model.max_model_len
        each = min(self.stopping.max_tokens, room) if self.stopping.HasField("max_tokens") else room
        return self.num_choices * each

    def accept(self, prompt_ids: Sequence[int]) -> Accepted:
        """Check the prompt's ids and what they leave room for. Raises InvalidArgument that names the field."""
        model, form = self.model, self.prompt.field
        prompt_ids = _check_prompt_ids(prompt_ids, model, form)
        room = model.max_model_len - len(prompt_ids)
        if room < 1:
            raise InvalidArgument(
                f"the prompt has {len(prompt_ids)} tokens, and the model takes {model.max_model_len} with its answer",
                field=form,
                remedy=f"shorten the prompt to at most {model.max_model_len - 1} tokens",
                reason="PROMPT_TOO_LONG",
            )
        return Accepted(
            request_id=self.request_id,
            prompt_ids=prompt_ids,
            sampling=self.sampling,
            stopping=check_stopping(self.stopping, room, self.stop_tokens),
            stop_strings=self.stop_strings,
            stop_tokens=self.stop_tokens,
            num_choices=self.num_choices,
            num_logprobs=self.num_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A request that may go to a router. `sampling` has its seed, `stopping` its max_tokens and no stop strings.

    stop_tokens: those of the stop strings that are special tokens, by id. `stopping` has them as stop ids too, so that
    the router ends the choice. As special tokens have no text, a string that holds one within other text is found only
    if the model writes that text in ordinary tokens.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: pb.Sampling
    stopping: pb.Stopping
    stop_strings: tuple[str, ...]
    stop_tokens: Mapping[int, str]
    num_choices: int
    num_logprobs: int | None

    @property
    def max_tokens(self) -> int:
        """Most tokens of one choice."""
        return self.stopping.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the caller of Resume has of one choice."""

    token_ids: tuple[int, ...]
    text_offset: int
    finish_reason: pb.FinishReason


def check_generate(
    request: pb.GenerateRequest,
    *,
    model: pb.Model,
    tokenizer: Tokenizer | None,
    draw_seed: Callable[[], int],
    draw_id: Callable[[], str],
) -> Asked:
    """Check a Generate request. NotFound for another model's name, InvalidArgument for a wrong field."""
    check_model(request.model, model)
    request_id = check_request_id(request.request_id)
    if request.num_choices > MAX_CHOICES:
        raise _too_large("num_choices", request.num_choices, MAX_CHOICES)
    stop_strings = _stop_strings(request.stopping.stop_strings, tokenizer)
    return Asked(
        request_id=request_id or draw_id(),
        prompt=_prompt(request, tokenizer, model),
        sampling=check_sampling(request.sampling, draw_seed),
        stopping=_check_stop_ids(request.stopping, model),
        stop_strings=stop_strings,
        stop_tokens=_stop_tokens(stop_strings, tokenizer, model),
        num_choices=request.num_choices or 1,
        num_logprobs=_num_logprobs(request, model),
        model=model,
    )


def check_progress(entries: Sequence[pb.ChoiceProgress], accepted: Accepted, model: pb.Model) -> dict[int, Progress]:
    """Check what the caller of Resume says it has, by choice."""
    found: dict[int, Progress] = {}
    for position, entry in enumerate(entries):
        field = f"progress[{position}]"
        if entry.choice_index >= accepted.num_choices:
            raise InvalidArgument(
                f"choice {entry.choice_index} of {accepted.num_choices} does not exist",
                field=f"{field}.choice_index",
                remedy=f"give 0 to {accepted.num_choices - 1}",
            )
        if entry.choice_index in found:
            raise InvalidArgument(
                f"choice {entry.choice_index} is there twice", field=f"{field}.choice_index", remedy="give it once"
            )
        if len(entry.token_ids) > accepted.max_tokens:
            raise InvalidArgument(
                f"{len(entry.token_ids)} tokens are more than max_tokens, {accepted.max_tokens}",
                field=f"{field}.token_ids",
                remedy="give the ids that this request's streams delivered",
            )
        _check_ids(entry.token_ids, model, f"{field}.token_ids")
        if entry.finish_reason not in pb.FinishReason.values():
            raise InvalidArgument(
                f"{entry.finish_reason} is no finish reason",
                field=f"{field}.finish_reason",
                remedy="give what was delivered",
            )
        found[entry.choice_index] = Progress(
            token_ids=tuple(entry.token_ids), text_offset=entry.text_offset, finish_reason=entry.finish_reason
        )
    return found


def check_score(request: pb.ScoreRequest, *, model: pb.Model, tokenizer: Tokenizer | None) -> Prompt:
    """Check a Score request and return its input; check_scored takes the ids."""
    check_model(request.model, model)
    form = request.WhichOneof("input")
    if form is None:
        raise InvalidArgument("there is no input", field="input", remedy="set text or token_ids", reason="EMPTY_PROMPT")
    if form == "text":
        return _text_prompt(request.text, tokenizer, model)
    return _ids_prompt(request.token_ids.ids, model)


def check_scored(token_ids: Sequence[int], field: str, model: pb.Model) -> tuple[int, ...]:
    """Check the ids of a Score request."""
    token_ids = _check_prompt_ids(token_ids, model, field)
    if len(token_ids) > model.max_model_len:
        raise InvalidArgument(
            f"the input has {len(token_ids)} tokens, and the model takes {model.max_model_len}",
            field=field,
            remedy="score it in parts",
            reason="PROMPT_TOO_LONG",
        )
    return token_ids


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


def _stop_strings(strings: Sequence[bytes], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    field = "stopping.stop_strings"
    if strings and tokenizer is None:
        raise InvalidArgument(
            "this model has no tokenizer, so there is no text to find them in", field=field, remedy="use stop_ids"
        )
    if len(strings) > MAX_STOP_STRINGS:
        raise _too_large(field, len(strings), MAX_STOP_STRINGS)
    found: list[str] = []
    for position, raw in enumerate(strings):
        name = f"{field}[{position}]"
        if not raw:
            raise InvalidArgument("an empty string would stop at once", field=name, remedy="leave it out")
        if len(raw) > MAX_STOP_STRING_BYTES:
            raise _too_large(f"{name} in bytes", len(raw), MAX_STOP_STRING_BYTES)
        found.append(_utf8(raw, name))
    return tuple(found)


def _stop_tokens(strings: Sequence[str], tokenizer: Tokenizer | None, model: pb.Model) -> dict[int, str]:
    found = {} if tokenizer is None else {tokenizer.special_id(string): string for string in strings}
    return {
        token_id: string for token_id, string in found.items() if token_id is not None and token_id < model.vocab_size
    }


def _num_logprobs(request: pb.GenerateRequest, model: pb.Model) -> int | None:
    if not request.HasField("num_logprobs"):
        return None
    if request.num_logprobs > MAX_LOGPROBS:
        raise _too_large("num_logprobs", request.num_logprobs, MAX_LOGPROBS)
    return min(request.num_logprobs, model.vocab_size)


def _check_stop_ids(stopping: pb.Stopping, model: pb.Model) -> pb.Stopping:
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise InvalidArgument("must be at least 1, but is 0", field="stopping.max_tokens", remedy="give at least 1")
    if len(stopping.stop_ids) > MAX_STOP_IDS:
        raise _too_large("stopping.stop_ids", len(stopping.stop_ids), MAX_STOP_IDS)
    _check_ids(stopping.stop_ids, model, "stopping.stop_ids")
    return stopping


def _prompt(request: pb.GenerateRequest, tokenizer: Tokenizer | None, model: pb.Model) -> Prompt:
    form = request.WhichOneof("prompt")
    if form is None:
        raise InvalidArgument(
            "there is no prompt", field="prompt", remedy="set one of text, token_ids and chat", reason="EMPTY_PROMPT"
        )
    if form == "chat":
        return _chat_prompt(request.chat, tokenizer)
    if form == "text":
        return _text_prompt(request.text, tokenizer, model)
    return _ids_prompt(request.token_ids.ids, model)


def _chat_prompt(chat: pb.ChatPrompt, tokenizer: Tokenizer | None) -> Prompt:
    if not chat.messages:
        raise InvalidArgument(
            "the conversation is empty",
            field="chat.messages",
            remedy="give at least one message",
            reason="EMPTY_PROMPT",
        )
    if tokenizer is None:
        raise _no_tokenizer("chat")
    if len(chat.messages) > MAX_MESSAGES:
        raise _too_large("chat.messages", len(chat.messages), MAX_MESSAGES)
    turns: list[tuple[str, str]] = []
    for position, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidArgument(
                "a message without a role",
                field=f"chat.messages[{position}].role",
                remedy='give "user" or another role',
            )
        if len(message.role) > MAX_ROLE_CHARS:
            raise _too_large(f"chat.messages[{position}].role in characters", len(message.role), MAX_ROLE_CHARS)
        turns.append((message.role, _utf8(message.content, f"chat.messages[{position}].content")))
    return Prompt(field="chat", turns=tuple(turns))


def _text_prompt(raw: bytes, tokenizer: Tokenizer | None, model: pb.Model) -> Prompt:
    if tokenizer is None:
        raise _no_tokenizer("text")
    if not raw:
        raise _empty("text")
    if len(raw) > (limit := tokenizer.max_bytes(model.max_model_len)):
        raise InvalidArgument(
            f"the text has {len(raw)} bytes, and no text of more than {limit} has at most {model.max_model_len} tokens",
            field="text",
            remedy="shorten it",
            reason="PROMPT_TOO_LONG",
        )
    return Prompt(field="text", text=_utf8(raw, "text"))


def _ids_prompt(token_ids: Sequence[int], model: pb.Model) -> Prompt:
    if len(token_ids) > model.max_model_len:
        raise InvalidArgument(
            f"there are {len(token_ids)} tokens, and the model takes {model.max_model_len}",
            field="token_ids",
            remedy="shorten the prompt",
            reason="PROMPT_TOO_LONG",
        )
    return Prompt(field="token_ids", token_ids=tuple(token_ids))


def _check_prompt_ids(token_ids: Sequence[int], model: pb.Model, field: str) -> tuple[int, ...]:
    if not token_ids:
        raise _empty(field)
    _check_ids(token_ids, model, field)
    return tuple(token_ids)


def _empty(field: str) -> InvalidArgument:
    return InvalidArgument("the prompt is empty", field=field, remedy="give at least one token", reason="EMPTY_PROMPT")


def _check_ids(token_ids: Sequence[int], model: pb.Model, field: str) -> None:
    if token_ids and max(token_ids) >= model.vocab_size:
        position, token_id = next((i, t) for i, t in enumerate(token_ids) if t >= model.vocab_size)
        raise InvalidArgument(
            f"token id {token_id} at position {position} is out of range",
            field=field,
            remedy=f"give ids from 0 to {model.vocab_size - 1}",
            reason="TOKEN_ID_OUT_OF_RANGE",
        )


def _check_number(sampling: pb.Sampling, name: str, bounds: str, is_within: Callable[[float], bool]) -> None:
    if not sampling.HasField(name):
        return
    value = float(getattr(sampling, name))
    if not (math.isfinite(value) and is_within(value)):
        raise InvalidArgument(f"{value:g} cannot be used", field=f"sampling.{name}", remedy=f"give {bounds}")


def _utf8(raw: bytes, field: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"the bytes are not UTF-8: {error.reason} at byte {error.start}",
            field=field,
            remedy="encode text as UTF-8, or send token_ids",
            reason="BROKEN_UTF8",
        ) from None


def _no_tokenizer(field: str) -> InvalidArgument:
    return InvalidArgument("this model has no tokenizer", field=field, remedy="send token_ids", reason="NO_TOKENIZER")


def _too_large(field: str, value: int, limit: int) -> InvalidArgument:
    return InvalidArgument(f"{value} is too many", field=field, remedy=f"give at most {limit}")


def _quoted(name: str) -> str:
    return repr(name if len(name) <= MAX_REQUEST_ID_CHARS else name[:MAX_REQUEST_ID_CHARS] + "...")
