"""What callers tell a gateway: every field of every request has a bound, and what is beyond it is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from balancer_svc.validation import check_scale
from collegium.fabric.errors import InvalidArgument, NotFound
from collegium.v1 import balancer_pb2, inference_pb2
from collegium.v1 import inference_pb2 as pb
from gateway.choice import Choice
from gateway.fields import check_model, check_request_id
from gateway.requests import Prompt, check_generate, check_progress, check_score, check_scored, check_target
from gateway.restore import restore
from gateway.stops import StopStrings
from gateway.tokenizer import Tokenizer
from gateway.translating import request_of

DEMO = Path(__file__).parents[2] / "models" / "demo-lm"
MODEL = pb.Model(name="lm", vocab_size=4096, max_model_len=16, eos_ids=[0])
TRANSLATOR = pb.Model(name="mt", vocab_size=4096, max_model_len=16, eos_ids=[0], is_encoder_decoder=True)
MOST = 2**32 - 1
NAN, INFINITE = float("nan"), float("inf")
LONG = 2**17

REQUESTS: dict[str, Any] = {
    method.input_type.name: method.input_type
    for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods
}
NESTED = "its fields have bounds"
# Of each field some values beyond its bound, or why any value will do.
BEYOND: dict[str, dict[str, Sequence[object] | str]] = {
    "GenerateRequest": {
        "request_id": ["x" * 129, "a\nb", "é", "x" * LONG],
        "model": ["other", "x" * LONG],
        "text": [b"", b"\xff", b"word " * LONG],
        "token_ids": NESTED,
        "chat": NESTED,
        "sampling": NESTED,
        "stopping": NESTED,
        "num_choices": [65, MOST],
        "num_logprobs": [21, MOST],
        "source_language": ["eng_Latn", "x" * LONG],  # of a model without an encoder, any
        "target_language": ["eng_Latn", "x" * LONG],
        "beam_search": NESTED,
    },
    "BeamSearch": {
        "num_beams": [33, MOST],
        "length_penalty": [10.1, -10.1, NAN, INFINITE],
        "early_stopping": [3, -1],
    },
    "TranslateRequest": {"options": NESTED, "text": [b"\xff", b"word " * LONG]},
    "TranslateOptions": {
        "model": ["other", "x" * LONG],
        "source_language": ["eng_Latn", "x" * LONG],  # of a tokenizer that knows none, any
        "target_language": ["eng_Latn", "x" * LONG],
        "sampling": NESTED,
        "stopping": NESTED,
        "num_choices": [65, MOST],
        "beam_search": NESTED,
        "logprobs": "yes or no",
    },
    "TokenIds": {"ids": [[], [4096], [MOST], [1] * 17, [1] * LONG]},
    "ChatPrompt": {"messages": [[], [pb.ChatMessage(role="user")] * 16_385]},
    "ChatMessage": {"role": ["", "x" * 129, "x" * LONG], "content": [b"\xff", b"word " * LONG]},
    "Sampling": {
        "temperature": [-1.0, NAN, INFINITE],
        "top_k": "above the vocabulary it is all of it",
        "top_p": [0.0, 1.1, NAN, -INFINITE],
        "min_p": [-0.1, 1.1, NAN],
        "repetition_penalty": [0.0, -1.0, NAN, INFINITE],
        "presence_penalty": [2.1, -2.1, NAN],
        "frequency_penalty": [2.1, -2.1, NAN],
        "seed": "a number of 64 bits like any other",
        "no_repeat_ngram_size": [65, MOST],
    },
    "Stopping": {
        "max_tokens": [0],  # above the model's length it is that
        "min_tokens": [14, MOST],
        "ignore_eos": "yes or no",
        "stop_ids": [[4096], [1] * 257, [MOST]],
        "stop_strings": [[b""], [b"\xff"], [b"x" * 1025], [b"x"] * 17],
    },
    "ResumeRequest": {"request": NESTED, "progress": [[pb.ChoiceProgress()] * 2, [pb.ChoiceProgress()] * LONG]},
    "ChoiceProgress": {
        "choice_index": [1, MOST],
        "token_ids": [[4096], [5] * 14, [5] * LONG],
        "text_offset": [50, MOST],
        "finish_reason": [99, -1],
    },
    "CancelRequest": {"request_id": ["x" * 129, "a\nb"]},
    "ScoreRequest": {
        "model": ["other"],
        "text": [b"", b"\xff", b"word " * LONG],
        "token_ids": NESTED,
        "target_text": [b"", b"\xff", b"word " * LONG, b"word " * 16],
        "target_ids": NESTED,
        "source_language": ["eng_Latn", "x" * LONG],  # of a tokenizer that knows none, any
        "target_language": ["eng_Latn", "x" * LONG],
    },
    "ListModelsRequest": {},
    "GetModelRequest": {"model": ["other", "x" * LONG]},
    "GetClusterRequest": {},
    "ScaleWorkersRequest": {"num_workers": [0, 257, MOST]},
}
# What a refusal calls a field otherwise.
CALLED = {"ids": "_ids", "content": "chat.messages"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(DEMO / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = Tokenizer.load(folder)
    assert found is not None
    return found


def messages(kinds: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the kinds of messages and those within, each once."""
    seen: dict[str, Any] = {}
    rest = list(kinds)
    while rest:
        kind = rest.pop()
        if kind.name not in seen:
            seen[kind.name] = kind
            rest += [field.message_type for field in kind.fields if field.message_type is not None]
    yield from seen.values()


def test_every_field_of_every_request_has_a_row() -> None:
    kinds = {kind.name: {field.name for field in kind.fields} for kind in messages(REQUESTS.values())}
    assert {name: set(rows) for name, rows in BEYOND.items()} == kinds
    for kind in messages(REQUESTS.values()):
        for field in kind.fields:
            assert (BEYOND[kind.name][field.name] is NESTED) <= (field.message_type is not None), field.full_name
            assert BEYOND[kind.name][field.name], field.full_name


def good(name: str, form: str) -> Any:
    """Make a request that is served, with every message within that can be there at once; form: of the prompt."""
    generate = pb.GenerateRequest(
        sampling=pb.Sampling(seed=1), stopping=pb.Stopping(max_tokens=13), beam_search=pb.BeamSearch(num_beams=1)
    )
    if form == "chat":
        generate.chat.messages.add(role="user", content=b"hi")
    elif form == "text":
        generate.text = b"hi"
    else:
        generate.token_ids.ids.extend([1, 2, 3])
    return {
        "GenerateRequest": generate,
        "ResumeRequest": pb.ResumeRequest(request=generate, progress=[pb.ChoiceProgress(token_ids=[5, 6])]),
        "ScoreRequest": pb.ScoreRequest(text=b"hi", target_text=b"hi")
        if form == "text"
        else pb.ScoreRequest(token_ids={"ids": [1, 2]}, target_ids={"ids": [1, 2]}),
        "ScaleWorkersRequest": pb.ScaleWorkersRequest(num_workers=256),
        "CancelRequest": pb.CancelRequest(request_id="r"),
        "TranslateRequest": pb.TranslateRequest(
            text=b"hi",
            options=pb.TranslateOptions(
                sampling=generate.sampling, stopping=generate.stopping, beam_search=generate.beam_search
            ),
        ),
    }.get(name, getattr(pb, name)())


def take(request: Any, tokenizer: Tokenizer) -> None:
    """Check a request as the service does, up to where the model's work begins."""
    match request:
        case pb.GenerateRequest():
            generate(request, (), tokenizer)
        case pb.ResumeRequest():
            generate(request.request, request.progress, tokenizer)
        case pb.TranslateRequest():
            sentence = request_of(request.options)
            sentence.text = request.text
            generate(sentence, (), tokenizer, TRANSLATOR)
        case pb.ScoreRequest():
            prompt = check_score(request, model=TRANSLATOR, tokenizer=tokenizer)
            target, _ = check_target(request, model=TRANSLATOR, tokenizer=tokenizer)
            assert target is not None
            check_scored(ids_of(prompt, tokenizer), prompt.field, TRANSLATOR)
            field = request.WhichOneof("target")
            check_scored(ids_of(target, tokenizer), field, TRANSLATOR, TRANSLATOR.max_model_len - 1)
        case pb.CancelRequest():
            check_request_id(request.request_id)
        case pb.GetModelRequest():
            check_model(request.model, MODEL)
        case pb.ScaleWorkersRequest():  # the balancer's to check: the gateway passes it on
            check_scale(balancer_pb2.ScaleRequest(num_workers=request.num_workers), 256)
        case _:
            pass


def generate(
    request: pb.GenerateRequest, progress: Sequence[pb.ChoiceProgress], tokenizer: Tokenizer, model: pb.Model = MODEL
) -> None:
    asked = check_generate(request, model=model, tokenizer=tokenizer, draw_seed=lambda: 1, draw_id=lambda: "drawn")
    accepted = asked.accept(ids_of(asked.prompt, tokenizer))
    given = check_progress(progress, accepted, MODEL)
    end = tokenizer.prompt_end(accepted.prompt_ids)
    choices = [
        Choice(index, prompt_end=end, stops=StopStrings(accepted.stop_strings), stop_tokens={}, min_tokens=0)
        for index in range(accepted.num_choices)
    ]
    for _ in restore(choices, given, accepted, MODEL):
        pass


def ids_of(prompt: Prompt, tokenizer: Tokenizer) -> Sequence[int]:
    if prompt.turns:
        return tokenizer.encode_chat(prompt.turns, max_bytes=tokenizer.max_bytes(MODEL.max_model_len))
    return tokenizer.encode(prompt.text) if prompt.text else prompt.token_ids


def test_what_has_no_target_and_what_needs_one_say_so(tokenizer: Tokenizer) -> None:
    for request in (pb.ScoreRequest(text=b"hi", target_text=b"hi"), pb.ScoreRequest(text=b"hi", target_ids={})):
        with pytest.raises(InvalidArgument, match="has no encoder, and scores its input") as caught:
            check_target(request, model=MODEL, tokenizer=tokenizer)
        assert caught.value.field == request.WhichOneof("target")
    with pytest.raises(InvalidArgument, match="has an encoder, and scores an answer to the input"):
        check_target(pb.ScoreRequest(text=b"hi"), model=TRANSLATOR, tokenizer=tokenizer)
    with pytest.raises(InvalidArgument, match="target_text"):
        check_target(pb.ScoreRequest(text=b"hi", target_text=b"hi"), model=TRANSLATOR, tokenizer=None)


def places(message: Any) -> Iterator[tuple[Any, str]]:
    """Iterate over (message, field) of a request and of the messages that it holds."""
    for field in message.DESCRIPTOR.fields:
        yield message, field.name
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from places(inner)


def put(message: Any, name: str, value: Any) -> None:
    if isinstance(value, list):
        message.ClearField(name)
        getattr(message, name).extend(value)
    else:
        setattr(message, name, value)


@pytest.mark.parametrize("form", ["token_ids", "text", "chat"])
@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_each_field_beyond_its_bound_is_refused_by_name(name: str, form: str, tokenizer: Tokenizer) -> None:
    take(good(name, form), tokenizer)
    for at, (message, field) in enumerate(list(places(good(name, form)))):
        values = BEYOND[message.DESCRIPTOR.name][field]
        for value in () if isinstance(values, str) else values:
            request = good(name, form)
            inner, _ = list(places(request))[at]
            put(inner, field, value)
            with pytest.raises((InvalidArgument, NotFound)) as caught:
                take(request, tokenizer)
                pytest.fail(f"{message.DESCRIPTOR.name}.{field} = {str(value)[:60]} is taken")
            assert CALLED.get(field, field) in (caught.value.field or ""), (field, str(value)[:60], caught.value)
            assert len(caught.value.message) < 700
