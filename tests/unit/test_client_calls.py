"""The SDK's logic without a network: requests, retries, resumption."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from collegium.client import RetryPolicy
from collegium.client.aio import _Texts as AsyncTexts
from collegium.client.generate_call import GenerateCall
from collegium.client.options import GenerateOptions, generate_request, score_request
from collegium.client.results import join_chunks, read_chunk
from collegium.client.retry import Addresses, Attempts
from collegium.client.sync import _Texts as SyncTexts
from collegium.client.translate_call import TranslateCall
from collegium.fabric.errors import (
    Cancelled,
    CollegiumError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from collegium.v1 import inference_pb2 as pb

GONE = Unavailable("gone")


def attempts(
    target: str = "a:1,b:1", *, rounds: int = 3, timeout_s: float | None = None, addresses: Addresses | None = None
) -> Attempts:
    policy = RetryPolicy(rounds=rounds, first_pause_s=1.0, longest_pause_s=4.0, jitter=0.0)
    return Attempts(addresses or Addresses(target), policy, now_s=0.0, timeout_s=timeout_s, rng=random.Random(0))


# Retries.


def test_another_address_is_tried_at_once_and_the_same_ones_after_growing_pauses() -> None:
    tries = attempts(rounds=4)
    seen = [(tries.address, None)]
    for _ in range(7):
        pause_s = tries.fail(GONE, 0.0)
        seen.append((tries.address, pause_s))
    assert seen == [("a:1", None), ("b:1", 0), ("a:1", 1), ("b:1", 0), ("a:1", 2), ("b:1", 0), ("a:1", 4), ("b:1", 0)]
    with pytest.raises(Unavailable):
        tries.fail(GONE, 0.0)


def test_progress_begins_the_count_anew() -> None:
    tries = attempts("a:1", rounds=2)
    for _ in range(10):
        assert tries.fail(GONE, 0.0) == 1.0
        tries.succeed(0.0)


def test_the_servers_delay_is_kept() -> None:
    assert attempts("a:1").fail(ResourceExhausted("full", retry_after_s=7.5), 0.0) == 7.5


@pytest.mark.parametrize(
    "error",
    [InvalidArgument("no"), Internal("fault"), DeadlineExceeded("late"), ResourceExhausted("message too large")],
)
def test_what_cannot_succeed_later_is_raised_at_once(error: CollegiumError) -> None:
    with pytest.raises(type(error)):
        attempts().fail(error, 0.0)


def test_a_stream_that_its_gateway_cut_is_taken_up_again() -> None:
    assert attempts().fail(Cancelled("the server went away"), 0.0) == 0.0


def test_no_pause_reaches_past_the_deadline() -> None:
    tries = attempts("a:1", timeout_s=1.5, rounds=9)
    assert tries.time_left_s(0.5) == 1.0
    assert tries.fail(GONE, 0.1) == 1.0
    with pytest.raises(Unavailable):
        tries.fail(GONE, 1.2)
    with pytest.raises(DeadlineExceeded):
        tries.time_left_s(1.5)


def test_addresses_take_turns_and_those_that_failed_come_last_for_a_while() -> None:
    addresses = Addresses(["a:1", "b:1,c:1"])
    assert [addresses.order(0.0)[0] for _ in range(4)] == ["a:1", "b:1", "c:1", "a:1"]
    addresses.note("b:1", has_failed=True, now_s=0.0)
    assert all(addresses.order(1.0)[-1] == "b:1" for _ in range(3))
    assert "b:1" in [addresses.order(3.0)[0] for _ in range(3)]
    addresses.note("b:1", has_failed=True, now_s=3.0)
    addresses.note("b:1", has_failed=False, now_s=3.0)
    assert "b:1" in [addresses.order(3.0)[0] for _ in range(3)]


@pytest.mark.parametrize("target", ["", " , ", "localhost", "h:0", "h:70000", "h:x", "a:1,b"])
def test_a_target_that_is_no_address_is_refused_by_name(target: str) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT") as caught:
        Addresses(target)
    assert caught.value.field == "target"


def test_the_deadline_that_grpc_notes_is_told_with_a_remedy() -> None:
    with pytest.raises(DeadlineExceeded, match="timeout_s: the deadline has passed; give more time"):
        attempts().fail(DeadlineExceeded("Stream removed (Deadline Exceeded)"), 0.0)


# Requests.


def test_absent_options_stay_absent_and_zero_is_not_absent() -> None:
    request = generate_request("hi", {"logprobs": 0, "seed": 0, "temperature": 0.0, "top_k": None})
    assert request.text == b"hi"
    assert request.request_id
    assert request.HasField("num_logprobs")
    assert request.sampling.HasField("seed")
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_k")
    assert not request.stopping.HasField("max_tokens")


def test_every_option_reaches_the_request() -> None:
    request = generate_request(
        None,
        {
            "prompt_ids": [1, 2],
            "model": "m",
            "max_tokens": 3,
            "min_tokens": 1,
            "temperature": 0.5,
            "top_k": 4,
            "top_p": 0.25,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": -1.0,
            "frequency_penalty": 1.0,
            "seed": 2**64 - 1,
            "ignore_eos": True,
            "stop": "END",
            "stop_ids": [7],
            "n": 2,
            "logprobs": 5,
            "request_id": "r",
        },
    )
    assert request == pb.GenerateRequest(
        request_id="r",
        model="m",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.Sampling(
            temperature=0.5,
            top_k=4,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=1.0,
            seed=2**64 - 1,
        ),
        stopping=pb.Stopping(max_tokens=3, min_tokens=1, ignore_eos=True, stop_ids=[7], stop_strings=[b"END"]),
        num_choices=2,
        num_logprobs=5,
    )
    chat = generate_request(None, {"messages": [{"role": "user", "content": "é"}]})
    assert chat.chat.messages[0].content == "é".encode()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt_ids": [-1]}, "prompt_ids"),
        ({"prompt_ids": [2**32]}, "prompt_ids"),
        ({"prompt_ids": [1], "max_tokens": -5}, "max_tokens"),
        ({"prompt_ids": [1], "top_k": -1}, "top_k"),
        ({"prompt_ids": [1], "seed": -1}, "seed"),
        ({"prompt_ids": [1], "seed": 2**64}, "seed"),
        ({"prompt_ids": [1], "n": 0}, "n"),
        ({"prompt_ids": [1], "logprobs": -1}, "logprobs"),
        ({"prompt_ids": [1], "stop": ["\ud800"]}, "stop"),
        ({"prompt_ids": [1], "messages": []}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_its_name(options: GenerateOptions, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        generate_request(None, options)
    assert caught.value.field == field
    assert caught.value.remedy


def test_an_unknown_option_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(TypeError, match="max_token'"):
        generate_request("x", {"max_token": 3})  # type: ignore[typeddict-unknown-key]


def test_a_score_takes_exactly_one_input() -> None:
    assert score_request(None, {"prompt_ids": [1, 2], "model": "m"}) == pb.ScoreRequest(
        model="m", token_ids=pb.TokenIds(ids=[1, 2])
    )
    for text, ids in ((None, None), ("x", [1])):
        with pytest.raises(InvalidArgument):
            score_request(text, {"prompt_ids": ids})


def test_a_score_has_one_target_at_most() -> None:
    said = score_request("a", {"target": "b", "source_language": "eng_Latn", "target_language": "fra_Latn"})
    assert (said.text, said.target_text) == (b"a", b"b")
    assert (said.source_language, said.target_language) == ("eng_Latn", "fra_Latn")
    assert score_request("a", {"target_ids": [3]}).target_ids.ids == [3]
    with pytest.raises(InvalidArgument, match="two targets"):
        score_request("a", {"target": "b", "target_ids": [3]})
    with pytest.raises(TypeError, match="to'"):
        score_request("a", {"to": "fra_Latn"})  # type: ignore[typeddict-unknown-key]


# Resumption.


def chunk(token_offset: int, text_offset: int, token_ids: list[int], text: str, **fields: Any) -> pb.Chunk:
    return pb.Chunk(token_offset=token_offset, text_offset=text_offset, token_ids=token_ids, text=text, **fields)


def test_a_call_begins_with_generate_and_goes_on_with_resume_from_what_it_has() -> None:
    call = GenerateCall(generate_request("hi", {"n": 2}))
    assert isinstance(call.next_request(), pb.GenerateRequest)
    start = pb.StreamStart(model="m", seed=9, prompt_tokens=1)
    call.absorb(pb.GenerateResponse(start=start, chunks=[chunk(0, 0, [5, 6], "ab")]))
    end = chunk(0, 0, [7], "c", choice_index=1, finish_reason=pb.FINISH_REASON_STOP)
    call.absorb(pb.ResumeResponse(response=pb.GenerateResponse(chunks=[end])))
    resume = call.next_request()
    assert isinstance(resume, pb.ResumeRequest)
    assert resume.request.request_id == call.request_id
    assert resume.request.sampling.seed == 9
    assert list(resume.progress) == [
        pb.ChoiceProgress(choice_index=0, token_ids=[5, 6], text_offset=2),
        pb.ChoiceProgress(choice_index=1, token_ids=[7], text_offset=1, finish_reason=pb.FINISH_REASON_STOP),
    ]
    with pytest.raises(Unavailable):
        call.end_stream()
    call.absorb(pb.GenerateResponse(usage=pb.Usage(output_tokens=3)))
    call.end_stream()
    assert call.usage is not None
    assert call.finish_reasons == ["stop"]


@pytest.mark.parametrize("offsets", [(1, 2), (3, 2), (2, 1)])
def test_a_gap_or_a_repetition_in_a_stream_is_a_fault(offsets: tuple[int, int]) -> None:
    call = GenerateCall(generate_request("hi", {}))
    call.absorb(pb.GenerateResponse(chunks=[chunk(0, 0, [5, 6], "ab")]))
    with pytest.raises(Internal):
        call.absorb(pb.GenerateResponse(chunks=[chunk(*offsets, [7], "c")]))


def test_chunks_join_into_choices() -> None:
    parts = [
        chunk(0, 0, [1], "a", logprobs=[pb.TokenLogprobs(chosen=-1, top_ids=[1], top=[-1])]),
        chunk(0, 0, [9], "z", choice_index=1, finish_reason=pb.FINISH_REASON_LENGTH),
        chunk(1, 1, [2], "b", finish_reason=pb.FINISH_REASON_STOP, stop_reason="2"),
    ]
    first, second = join_chunks(map(read_chunk, parts), 2)
    assert (first.token_ids, first.text, first.finish_reason, first.stop_reason) == ((1, 2), "ab", "stop", "2")
    assert first.logprobs[0].top == ((1, -1.0),)
    assert (second.token_ids, second.finish_reason) == ((9,), "length")


# Translations.


def answered(index: int, text: str) -> pb.TranslateResponse:
    return pb.TranslateResponse(index=index, translations=[pb.Translation(text=text)])


def test_what_a_broken_stream_has_not_answered_goes_into_the_next_and_what_it_takes_late_does_not_get_lost() -> None:
    call = TranslateCall(pb.TranslateOptions(target_language="fra"))
    first, begun = call.begin()
    assert [one.options.target_language for one in begun] == ["fra"]
    for text in "abc":
        request = call.send(text, first)
        assert request is not None and request.text == text.encode()
    assert call.absorb(answered(0, "A")).index == 0
    second, begun = call.begin()
    assert [one.text for one in begun[1:]] == [b"b", b"c"]
    assert call.send("d", first) is None
    assert call.send("d", second) is not None
    found = [call.absorb(answered(index, text)) for index, text in enumerate("BCD")]
    assert [(one.index, one.source, one.text) for one in found] == [(1, "b", "B"), (2, "c", "C"), (3, "d", "D")]
    with pytest.raises(Unavailable):
        call.end_stream()
    call.has_all = True
    call.end_stream()


def test_a_text_that_comes_when_its_stream_is_over_is_the_next_streams() -> None:
    may_come, call = threading.Event(), TranslateCall(pb.TranslateOptions())

    def slowly() -> Iterator[str]:
        may_come.wait()
        yield "late"

    texts = SyncTexts(slowly())
    first, _ = call.begin()
    late: list[object] = []
    waiting = threading.Thread(target=lambda: late.append(texts.send_next(call, first)))
    waiting.start()
    second, begun = call.begin()
    assert len(begun) == 1
    may_come.set()
    waiting.join()
    request = texts.send_next(call, second)
    assert late == [None] and request is not None and request.text == b"late"
    assert texts.send_next(call, second) is None and call.has_all and not call.is_complete


def test_a_text_that_comes_when_its_stream_is_over_is_the_next_streams_of_an_async_client() -> None:
    async def run() -> None:
        may_come, call = asyncio.Event(), TranslateCall(pb.TranslateOptions())

        async def slowly() -> AsyncIterator[str]:
            await may_come.wait()
            yield "late"

        texts = AsyncTexts(slowly())
        first, _ = call.begin()
        waiting = asyncio.create_task(texts.send_next(call, first))
        cancelled = asyncio.create_task(texts.send_next(call, first))
        await asyncio.sleep(0)
        cancelled.cancel()
        second, _ = call.begin()
        may_come.set()
        assert await waiting is None
        request = await texts.send_next(call, second)
        assert request is not None and request.text == b"late"
        assert await texts.send_next(call, second) is None and call.has_all and not call.is_complete

    asyncio.run(run())


def test_a_text_that_no_message_can_carry_fails_alone() -> None:
    call = TranslateCall(pb.TranslateOptions())
    stream, _ = call.begin()
    sent = [call.send(text, stream) for text in ("a", "b" * (1 << 21), "c")]
    assert all(one is not None and one.ByteSize() < 100 for one in sent)
    failed = pb.TranslateResponse(index=1, failure=pb.TranslateFailure(code=3, message="no UTF-8"))
    found = [call.absorb(one) for one in (answered(0, "A"), failed, answered(2, "C"))]
    assert isinstance(found[1].error, InvalidArgument) and "2,097,152 bytes" in str(found[1].error)
    assert [found[0].text, found[2].text] == ["A", "C"]
