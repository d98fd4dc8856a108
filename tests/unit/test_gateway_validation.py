"""Every field of a request is checked, and the refusal names the field and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from collegium.fabric.errors import InvalidArgument, NotFound
from collegium.v1 import inference_pb2 as pb
from gateway.choice import Choice
from gateway.requests import Accepted, Prompt, check_generate, check_progress, check_score, check_scored
from gateway.restore import restore
from gateway.stops import StopStrings
from gateway.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent.parent / "models" / "demo-lm"
TOKENIZER = Tokenizer.load(DEMO)
MODEL = pb.Model(name="lm", vocab_size=4096, max_model_len=16, eos_ids=[0])
NAN, INFINITE = float("nan"), float("inf")


def check(tokenizer: Tokenizer | None = TOKENIZER, **fields: object) -> Accepted:
    if not {"text", "token_ids", "chat"} & set(fields):
        fields["token_ids"] = pb.TokenIds(ids=[1, 2, 3])
    request = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
    asked = check_generate(request, model=MODEL, tokenizer=tokenizer, draw_seed=lambda: 77, draw_id=lambda: "drawn")
    return asked.accept(ids_of(asked.prompt, tokenizer))


def ids_of(prompt: Prompt, tokenizer: Tokenizer | None) -> Sequence[int]:
    if prompt.turns:
        return tokenizer.encode_chat(prompt.turns) if tokenizer else ()
    return tokenizer.encode(prompt.text) if tokenizer and prompt.text else prompt.token_ids


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token_ids": ids()}, "token_ids"),
        ({"token_ids": ids(1, 4096)}, "token_ids"),
        ({"token_ids": ids(*range(16))}, "token_ids"),
        ({"text": b""}, "text"),
        ({"text": b"\xff\xfe"}, "text"),
        ({"text": b"word " * 40}, "text"),
        ({"chat": pb.ChatPrompt()}, "chat.messages"),
        ({"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=b"x")])}, "chat"),
        ({"chat": pb.ChatPrompt(messages=[pb.ChatMessage(content=b"x")])}, "chat.messages[0].role"),
        (
            {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=b"\xc3")])},
            "chat.messages[0].content",
        ),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"num_choices": 65}, "num_choices"),
        ({"num_logprobs": 21}, "num_logprobs"),
        ({"sampling": pb.Sampling(temperature=-1)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=NAN)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=INFINITE)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(top_p=0)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(top_p=1.5)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(top_p=NAN)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(min_p=-0.1)}, "sampling.min_p"),
        ({"sampling": pb.Sampling(min_p=NAN)}, "sampling.min_p"),
        ({"sampling": pb.Sampling(repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": pb.Sampling(repetition_penalty=NAN)}, "sampling.repetition_penalty"),
        ({"sampling": pb.Sampling(presence_penalty=-3)}, "sampling.presence_penalty"),
        ({"sampling": pb.Sampling(frequency_penalty=NAN)}, "sampling.frequency_penalty"),
        ({"stopping": pb.Stopping(max_tokens=0)}, "stopping.max_tokens"),
        ({"stopping": pb.Stopping(max_tokens=4, min_tokens=5)}, "stopping.min_tokens"),
        ({"stopping": pb.Stopping(min_tokens=14)}, "stopping.min_tokens"),
        ({"stopping": pb.Stopping(stop_ids=[4096])}, "stopping.stop_ids"),
        ({"stopping": pb.Stopping(stop_ids=[1] * 257)}, "stopping.stop_ids"),
        ({"stopping": pb.Stopping(stop_strings=[b""])}, "stopping.stop_strings[0]"),
        ({"stopping": pb.Stopping(stop_strings=[b"a", b"\xff"])}, "stopping.stop_strings[1]"),
        ({"stopping": pb.Stopping(stop_strings=[b"a" * 1025])}, "stopping.stop_strings[0]"),
        ({"stopping": pb.Stopping(stop_strings=[b"a"] * 17)}, "stopping.stop_strings"),
    ],
)
def test_a_wrong_field_is_named_with_its_remedy(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check(**fields)
    assert (caught.value.field or "").startswith(field)
    assert field in caught.value.message
    assert caught.value.remedy


def test_a_request_without_a_prompt_says_which_fields_there_are() -> None:
    with pytest.raises(InvalidArgument, match="text, token_ids and chat"):
        check_generate(pb.GenerateRequest(), model=MODEL, tokenizer=TOKENIZER, draw_seed=lambda: 1, draw_id=lambda: "x")


def test_an_unknown_model_is_not_found_and_the_known_one_is_named() -> None:
    with pytest.raises(NotFound, match="'lm'"):
        check(model="other")


@pytest.mark.parametrize(
    "fields", [{"text": b"hi"}, {"stopping": pb.Stopping(stop_strings=[b"x"])}], ids=["text", "stop strings"]
)
def test_without_a_tokenizer_what_needs_text_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        check(tokenizer=None, **fields)


def test_defaults_are_filled_in() -> None:
    accepted = check()
    assert accepted.request_id == "drawn"
    assert accepted.sampling.seed == 77
    assert accepted.max_tokens == 13  # what the model's length leaves
    assert accepted.num_choices == 1
    assert accepted.num_logprobs is None


def test_max_tokens_ends_at_the_models_length() -> None:
    assert check(stopping=pb.Stopping(max_tokens=1000)).max_tokens == 13
    assert check(stopping=pb.Stopping(max_tokens=5)).max_tokens == 5


def test_a_given_seed_stays_even_where_it_is_zero() -> None:
    assert check(sampling=pb.Sampling(seed=0)).sampling.seed == 0


def test_zero_logprobs_are_not_absent_ones() -> None:
    assert check(num_logprobs=0).num_logprobs == 0


def test_the_request_itself_is_not_changed() -> None:
    request = pb.GenerateRequest(token_ids=ids(1), sampling=pb.Sampling(temperature=1))
    before = request.SerializeToString()
    check_generate(request, model=MODEL, tokenizer=None, draw_seed=lambda: 5, draw_id=lambda: "x")
    assert request.SerializeToString() == before


def test_a_score_takes_the_models_whole_length_and_no_more() -> None:
    def score(request: pb.ScoreRequest, tokenizer: Tokenizer | None) -> Sequence[int]:
        prompt = check_score(request, model=MODEL, tokenizer=tokenizer)
        return check_scored(ids_of(prompt, tokenizer), prompt.field, MODEL)

    assert len(score(pb.ScoreRequest(token_ids=ids(*range(16))), None)) == 16
    for request, field in (
        (pb.ScoreRequest(token_ids=ids(*range(17))), "token_ids"),
        (pb.ScoreRequest(), "input"),
        (pb.ScoreRequest(token_ids=ids()), "token_ids"),
        (pb.ScoreRequest(text=b"\xff"), "text"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            score(request, TOKENIZER)
        assert caught.value.field == field


# What Resume is told.


def resumed(progress: list[pb.ChoiceProgress], **fields: object) -> list[Choice]:
    accepted = check(**({"text": b"a"} | fields))
    choices = [
        Choice(
            index,
            prompt_end=None if TOKENIZER is None else TOKENIZER.prompt_end(accepted.prompt_ids),
            stops=StopStrings(accepted.stop_strings),
            stop_tokens=accepted.stop_tokens,
            min_tokens=accepted.stopping.min_tokens,
        )
        for index in range(accepted.num_choices)
    ]
    for _ in restore(choices, check_progress(progress, accepted, MODEL), accepted, MODEL):
        pass
    return choices


def encoded(text: str) -> list[int]:
    assert TOKENIZER is not None
    return TOKENIZER.encode(text)


def test_a_resumed_choice_goes_on_where_its_caller_stands() -> None:
    token_ids = encoded(" one two")
    (choice,) = resumed([pb.ChoiceProgress(token_ids=token_ids, text_offset=8)])
    assert choice.take() is None
    choice.add(encoded(" three"))
    chunk = choice.take()
    assert chunk is not None
    assert (chunk.token_offset, chunk.text_offset, chunk.text) == (len(token_ids), 8, " three")


def test_text_that_the_caller_has_not_seen_comes_with_the_next_chunk() -> None:
    (choice,) = resumed([pb.ChoiceProgress(token_ids=encoded(" one two"), text_offset=4)])
    choice.add(encoded("!"))
    chunk = choice.take()
    assert chunk is not None
    assert (chunk.text_offset, chunk.text) == (4, " two!")


@pytest.mark.parametrize(
    ("token_ids", "stopping", "reason", "stop_reason"),
    [
        ([5, 0], pb.Stopping(), pb.FINISH_REASON_STOP, "0"),
        ([5, 6], pb.Stopping(stop_ids=[6]), pb.FINISH_REASON_STOP, "6"),
        ([5, 6], pb.Stopping(max_tokens=2), pb.FINISH_REASON_LENGTH, ""),
        ([5, 0], pb.Stopping(max_tokens=2, ignore_eos=True), pb.FINISH_REASON_LENGTH, ""),
        (encoded(" x END"), pb.Stopping(stop_strings=[b"END"]), pb.FINISH_REASON_STOP, "END"),
    ],
)
def test_an_end_that_was_lost_on_the_way_is_found_again(
    token_ids: list[int], stopping: pb.Stopping, reason: int, stop_reason: str
) -> None:
    (choice,) = resumed([pb.ChoiceProgress(token_ids=token_ids, text_offset=0)], stopping=stopping)
    chunk = choice.take()
    assert chunk is not None
    assert (chunk.finish_reason, chunk.stop_reason, list(chunk.token_ids)) == (reason, stop_reason, [])


def test_a_choice_whose_end_the_caller_knows_says_nothing_more() -> None:
    finished = pb.ChoiceProgress(choice_index=1, token_ids=[5], finish_reason=pb.FINISH_REASON_STOP)
    first, second = resumed([finished], num_choices=2)
    assert not first.is_finished
    assert second.is_finished
    assert second.take() is None


@pytest.mark.parametrize(
    ("progress", "field"),
    [
        ([pb.ChoiceProgress(choice_index=1)], "progress[0].choice_index"),
        ([pb.ChoiceProgress(), pb.ChoiceProgress()], "progress[1].choice_index"),
        ([pb.ChoiceProgress(token_ids=[4096])], "progress[0].token_ids"),
        ([pb.ChoiceProgress(token_ids=range(1, 17))], "progress[0].token_ids"),
        ([pb.ChoiceProgress(token_ids=[0, 5])], "token_ids"),
        ([pb.ChoiceProgress(token_ids=[5], text_offset=99)], "text_offset"),
    ],
)
def test_progress_that_cannot_be_is_refused(progress: list[pb.ChoiceProgress], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resumed(progress)
    assert field in (caught.value.field or "")
    assert caught.value.remedy
