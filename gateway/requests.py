"""Check a whole request before anything else sees it, and give it the form that routers take.

Owns what a request is on its way: Asked, then Accepted. Pure: a request and the model in, an Asked or an error that
names the field and the remedy out; the fields themselves are checked by fields.py. What costs more than reading the
request is left to others: Asked.prompt says what is to be rendered and tokenised, and accept() takes the token ids. A
router may trust what passed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from collegium.fabric.errors import InvalidArgument
from collegium.v1 import inference_pb2 as pb
from gateway import fields
from gateway.tokenizer import Tokenizer

MAX_CHOICES = 64
MAX_MESSAGES = 16_384
MAX_ROLE_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt as it was given, in one of three forms. field: the request's name of that form."""

    field: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # (role, content)
    language: str = ""  # of the text, where the model is told


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
    forced_id: int | None
    beam_search: pb.BeamSearch | None
    model: pb.Model

    @property
    def num_output_tokens(self) -> int:
        """Most tokens that all choices together may grow to."""
        room = self.model.max_model_len
        each = min(self.stopping.max_tokens, room) if self.stopping.HasField("max_tokens") else room
        return max(self.num_choices, 0 if self.beam_search is None else self.beam_search.num_beams) * each

    def accept(self, prompt_ids: Sequence[int]) -> Accepted:
        """Check the prompt's ids and what they leave room for. Raises InvalidArgument that names the field."""
        model, form = self.model, self.prompt.field
        prompt_ids = fields.check_prompt_ids(prompt_ids, model, form)
        if model.is_encoder_decoder:
            if len(prompt_ids) > model.max_model_len:
                raise InvalidArgument(
                    f"the source has {len(prompt_ids)} tokens, and the model takes {model.max_model_len}",
                    field=form,
                    remedy="translate it in parts, such as sentences",
                    reason="PROMPT_TOO_LONG",
                )
            room = model.max_model_len - 1  # what a decoder begins with
        else:
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
            stopping=fields.check_stopping(self.stopping, room, self.stop_tokens),
            stop_strings=self.stop_strings,
            stop_tokens=self.stop_tokens,
            num_choices=self.num_choices,
            num_logprobs=self.num_logprobs,
            forced_id=self.forced_id,
            beam_search=self.beam_search,
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
    forced_id: int | None = None
    beam_search: pb.BeamSearch | None = None

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
    fields.check_model(request.model, model)
    request_id = fields.check_request_id(request.request_id)
    if request.num_choices > MAX_CHOICES:
        raise fields.too_large("num_choices", request.num_choices, MAX_CHOICES)
    stop_strings = fields.check_stop_strings(request.stopping.stop_strings, tokenizer)
    return Asked(
        request_id=request_id or draw_id(),
        prompt=_prompt(request, tokenizer, model),
        sampling=fields.check_sampling(request.sampling, draw_seed),
        stopping=fields.check_stop_ids(request.stopping, model),
        stop_strings=stop_strings,
        stop_tokens=fields.stop_tokens_of(stop_strings, tokenizer, model),
        num_choices=request.num_choices or 1,
        num_logprobs=fields.check_num_logprobs(request, model),
        forced_id=fields.check_language(request.target_language, "target_language", tokenizer, model),
        beam_search=fields.check_beams(request),
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
        fields.check_ids(entry.token_ids, model, f"{field}.token_ids")
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
    fields.check_model(request.model, model)
    fields.check_language(request.source_language, "source_language", tokenizer, model)
    form = request.WhichOneof("input")
    if form is None:
        raise InvalidArgument("there is no input", field="input", remedy="set text or token_ids", reason="EMPTY_PROMPT")
    if form == "text":
        return replace(_text_prompt(request.text, tokenizer, model), language=request.source_language)
    return _ids_prompt(request.token_ids.ids, model)


def check_target(
    request: pb.ScoreRequest, *, model: pb.Model, tokenizer: Tokenizer | None
) -> tuple[Prompt | None, int | None]:
    """Check what a Score request scores beside its input: the target, and the id that its language begins it with."""
    form = request.WhichOneof("target")
    forced = fields.check_language(request.target_language, "target_language", tokenizer, model)
    if not model.is_encoder_decoder:
        if form is not None:
            raise InvalidArgument("this model has no encoder, and scores its input", field=form, remedy="leave it out")
        return None, None
    if forced is None and model.HasField("forced_id"):
        forced = model.forced_id
    if form is None:
        raise InvalidArgument(
            "this model has an encoder, and scores an answer to the input",
            field="target_text",
            remedy="set target_text or target_ids",
            reason="EMPTY_PROMPT",
        )
    if form == "target_ids":
        return _ids_prompt(request.target_ids.ids, model, form), forced
    language = request.target_language
    if not language and tokenizer is not None:
        language = next((one for one in tokenizer.languages if tokenizer.special_id(one) == forced), "")
    return replace(_text_prompt(request.target_text, tokenizer, model, form), language=language), forced


def check_scored(token_ids: Sequence[int], field: str, model: pb.Model, most: int = 0) -> tuple[int, ...]:
    """Check the ids of a Score request. most: of them; 0: as many as the model takes."""
    token_ids = fields.check_prompt_ids(token_ids, model, field)
    if len(token_ids) > (most := most or model.max_model_len):
        raise InvalidArgument(
            f"the input has {len(token_ids)} tokens, and the model takes {most}",
            field=field,
            remedy="score it in parts",
            reason="PROMPT_TOO_LONG",
        )
    return token_ids


def _prompt(request: pb.GenerateRequest, tokenizer: Tokenizer | None, model: pb.Model) -> Prompt:
    fields.check_language(request.source_language, "source_language", tokenizer, model)
    form = request.WhichOneof("prompt")
    if form is None:
        raise InvalidArgument(
            "there is no prompt", field="prompt", remedy="set one of text, token_ids and chat", reason="EMPTY_PROMPT"
        )
    if form == "chat":
        return _chat_prompt(request.chat, tokenizer)
    if form == "text":
        return replace(_text_prompt(request.text, tokenizer, model), language=request.source_language)
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
        raise fields.no_tokenizer("chat")
    if len(chat.messages) > MAX_MESSAGES:
        raise fields.too_large("chat.messages", len(chat.messages), MAX_MESSAGES)
    turns: list[tuple[str, str]] = []
    for position, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidArgument(
                "a message without a role",
                field=f"chat.messages[{position}].role",
                remedy='give "user" or another role',
            )
        if len(message.role) > MAX_ROLE_CHARS:
            raise fields.too_large(f"chat.messages[{position}].role in characters", len(message.role), MAX_ROLE_CHARS)
        turns.append((message.role, fields.read_utf8(message.content, f"chat.messages[{position}].content")))
    return Prompt(field="chat", turns=tuple(turns))


def _text_prompt(raw: bytes, tokenizer: Tokenizer | None, model: pb.Model, field: str = "text") -> Prompt:
    if tokenizer is None:
        raise fields.no_tokenizer(field)
    if not raw:
        raise fields.empty_prompt(field)
    if len(raw) > (limit := tokenizer.max_bytes(model.max_model_len)):
        raise InvalidArgument(
            f"the text has {len(raw)} bytes, and no text of more than {limit} has at most {model.max_model_len} tokens",
            field=field,
            remedy="shorten it",
            reason="PROMPT_TOO_LONG",
        )
    return Prompt(field=field, text=fields.read_utf8(raw, field))


def _ids_prompt(token_ids: Sequence[int], model: pb.Model, field: str = "token_ids") -> Prompt:
    if len(token_ids) > model.max_model_len:
        raise InvalidArgument(
            f"there are {len(token_ids)} tokens, and the model takes {model.max_model_len}",
            field=field,
            remedy="shorten the prompt",
            reason="PROMPT_TOO_LONG",
        )
    return Prompt(field="token_ids", token_ids=tuple(token_ids))
