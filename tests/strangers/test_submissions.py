"""Whatever a gateway submits is either served or refused by the name of a field, and costs nobody else a token."""

from __future__ import annotations

import asyncio
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.fabric.errors import InvalidArgument
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as pb
from router_svc.messages import sequences_of
from router_svc.service import Outboxes, RouterService
from router_svc.submissions import MAX_FRAME_ITEMS
from tests.oracle import Oracle
from tests.router_rig import MAX_MODEL_LEN, RouterRig, router_rig

INVALID_ARGUMENT = 3
VOCAB = 320
TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def rig(oracle: Oracle) -> Iterator[RouterRig]:
    with router_rig(oracle.checkpoint("mixtral")) as running:
        assert running.model.vocab_size == VOCAB
        yield running


@pytest.fixture(scope="module")
def canary(rig: RouterRig) -> list[int]:
    """What the innocent request answers when it is alone."""
    (outcome,) = rig.ask(rig.submission("canary", prompt_ids=[40, 41, 42, 43])).values()
    assert len(outcome.token_ids) == 6
    return outcome.token_ids


def starts(*indexes: int, output_ids: Any = ()) -> list[pb.ChoiceStart]:
    return [pb.ChoiceStart(choice_index=index, output_ids=output_ids) for index in indexes]


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": ipb.Sampling(seed=1, **fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": ipb.Stopping(**({"max_tokens": 6, "ignore_eos": True} | fields))}


def beams(**fields: Any) -> dict[str, Any]:
    return {"beam_search": ipb.BeamSearch(**fields)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"request_id": ""}, "request_id"),
    ({"request_id": "x" * 257}, "request_id"),
    ({"request_id": "x" * 100_000}, "request_id"),
    ({"request_id": "line\nbreak"}, "request_id"),
    ({"request_id": "é"}, "request_id"),
    ({"prompt_ids": []}, "prompt_ids"),
    ({"prompt_ids": [VOCAB]}, "prompt_ids"),
    ({"prompt_ids": [5, 2**32 - 1]}, "prompt_ids"),
    ({"prompt_ids": [5] * MAX_MODEL_LEN}, "prompt_ids"),
    ({"prompt_ids": [5] * (MAX_MODEL_LEN + 1), "is_score": True}, "prompt_ids"),
    ({"choices": starts(0, output_ids=[VOCAB])}, r"choices\[0\].output_ids"),
    ({"choices": [*starts(0), *starts(1, output_ids=[1, 2**32 - 1])]}, r"choices\[1\].output_ids"),
    ({"choices": starts(0, output_ids=[5] * 7)}, r"choices\[0\].output_ids"),
    ({"choices": starts(0, output_ids=[5] * 400), **stopping(max_tokens=1000)}, r"choices\[0\].output_ids"),
    ({"choices": starts(*[3] * 30)}, r"choices\[1\].choice_index"),
    ({"choices": starts(0, 1, 2, 1)}, r"choices\[3\].choice_index"),
    ({"choices": starts(64)}, r"choices\[0\].choice_index"),
    ({"choices": starts(0, 2**32 - 1)}, r"choices\[1\].choice_index"),
    ({"choices": starts(*range(64), 64)}, "choices"),
    ({"choices": starts(*[0] * 10_000)}, "choices"),
    ({"choices": starts(0, output_ids=[5]), "is_score": True}, r"choices\[0\].output_ids"),
    ({"choices": starts(0, 1), "is_score": True}, "choices"),
    ({"num_logprobs": 21}, "num_logprobs"),
    ({"num_logprobs": 2**32 - 1}, "num_logprobs"),
    ({"num_logprobs": 21, "is_score": True}, "num_logprobs"),
    (stopping(stop_ids=[5] * 257), "stopping.stop_ids"),
    (stopping(stop_ids=[VOCAB]), "stopping.stop_ids"),
    (stopping(stop_strings=[b"stop"]), "stopping.stop_strings"),
    (stopping(min_tokens=7), "stopping.min_tokens"),
    (stopping(min_tokens=2**32 - 1), "stopping.min_tokens"),
    (stopping(max_tokens=0), "stopping.max_tokens"),
    *((sampling(temperature=value), "sampling.temperature") for value in (NAN, INF, -INF, -0.5)),
    *((sampling(top_p=value), "sampling.top_p") for value in (NAN, INF, 0.0, -1.0, 1.5)),
    *((sampling(min_p=value), "sampling.min_p") for value in (NAN, INF, -0.1, 1.1)),
    *((sampling(repetition_penalty=value), "sampling.repetition_penalty") for value in (NAN, INF, 0.0, -1.0)),
    *((sampling(presence_penalty=value), "sampling.presence_penalty") for value in (NAN, INF, 2.1, -2.1)),
    *((sampling(frequency_penalty=value), "sampling.frequency_penalty") for value in (NAN, -INF, 2.1, -2.1)),
    (sampling(no_repeat_ngram_size=65), "sampling.no_repeat_ngram_size"),
    ({"forced_id": 5}, "forced_id"),  # of a model without an encoder, any
    ({"forced_id": 2**32 - 1}, "forced_id"),
    ({"target_ids": [5], "is_score": True}, "target_ids"),  # of a model without an encoder, any
    (beams(num_beams=33), "beam_search.num_beams"),
    *((beams(num_beams=2, length_penalty=value), "beam_search.length_penalty") for value in (NAN, INF, 11, -11)),
    (beams(num_beams=2, early_stopping=3), "beam_search.early_stopping"),
    (beams(num_beams=2) | {"is_score": True}, "beam_search"),
    (beams(num_beams=2) | {"choices": starts(0, 1, 2)}, "choices"),
    (beams(num_beams=2) | {"choices": starts(1)}, "choices"),
    (beams(num_beams=2) | {"choices": starts(0, output_ids=[5])}, "choices"),
    (beams(num_beams=2) | sampling(temperature=1.0), "sampling"),
    (beams(num_beams=2) | sampling(frequency_penalty=1.0), "sampling"),
    (beams(num_beams=2) | sampling(repetition_penalty=1.5), "sampling.repetition_penalty"),
    ({"traceparent": "x" * 100_000}, "traceparent"),
    ({"traceparent": TRACEPARENT + "\n"}, "traceparent"),
    ({"traceparent": TRACEPARENT.replace("0123456789abcdef0123456789abcdef", "0" * 32)}, "traceparent"),
    ({"traceparent": TRACEPARENT.upper()}, "traceparent"),
]
SERVED: list[dict[str, Any]] = [
    {"request_id": "x" * 256},
    {"prompt_ids": [5] * (MAX_MODEL_LEN - 1)},
    {"prompt_ids": [5] * MAX_MODEL_LEN, "is_score": True},
    {"prompt_ids": [5], "is_score": True},
    {"choices": []},
    {"choices": starts(63)},
    {"choices": starts(*range(63, -1, -1)), **stopping(max_tokens=2)},
    {"choices": starts(0, output_ids=[5] * 6)},
    {"choices": starts(0, output_ids=[5] * 5)},
    {"num_logprobs": 20},
    beams(num_beams=3) | {"choices": starts(0, 1)},
    beams(num_beams=1, length_penalty=-10) | {"choices": starts(0, 1)},
    sampling(no_repeat_ngram_size=64),
    {"num_logprobs": 20, "is_score": True},
    {"deadline_ms": 2**64 - 1},
    {"deadline_ms": 2**63},
    {"caller": 2**64 - 1},
    {"traceparent": TRACEPARENT},
    stopping(stop_ids=range(256), min_tokens=6),
    stopping(min_tokens=6, ignore_eos=False),
    {"prompt_ids": [5] * (MAX_MODEL_LEN - 9), **stopping(max_tokens=2**32 - 1, min_tokens=MAX_MODEL_LEN)},
    sampling(top_k=2**32 - 1, temperature=3e38),
    sampling(temperature=1e-45, top_p=1e-45, min_p=1.0),
    sampling(repetition_penalty=1e-45),
    sampling(repetition_penalty=3.4e38, presence_penalty=-2, frequency_penalty=2),
]


@pytest.mark.parametrize("position", range(2))
def test_each_wrong_field_is_refused_by_name_and_the_others_of_its_frame_go_on(
    rig: RouterRig, canary: list[int], position: int
) -> None:
    wrong = [
        rig.submission(**({"request_id": f"wrong-{number}"} | changes)) for number, (changes, _) in enumerate(REFUSED)
    ]
    innocent = rig.submission("canary", prompt_ids=[40, 41, 42, 43])
    outcomes = rig.ask(*([innocent, *wrong] if position else [*wrong, innocent]))
    assert outcomes.pop(("canary", 0)).token_ids == canary
    for submission, (changes, field) in zip(wrong, REFUSED, strict=True):
        mine = {key: outcomes[key] for key in outcomes if key[0] == submission.request_id}
        assert mine, changes
        if len(submission.request_id) <= 256:
            indexes = {start.choice_index for start in submission.choices}
            assert {index for _, index in mine} <= indexes | {0} and len(mine) == min(64, max(1, len(indexes)))
        for outcome in mine.values():
            assert outcome.failure is not None and not outcome.token_ids, changes
            assert outcome.failure.code == INVALID_ARGUMENT
            assert re.match(field, outcome.failure.message), (outcome.failure.message, field)
            assert len(outcome.failure.message) < 300
    assert rig.is_idle()


def test_values_at_their_bounds_are_served(rig: RouterRig, canary: list[int]) -> None:
    good = [rig.submission(**({"request_id": f"good-{number}"} | changes)) for number, changes in enumerate(SERVED)]
    outcomes = rig.ask(*good, rig.submission("canary", prompt_ids=[40, 41, 42, 43]))
    assert outcomes.pop(("canary", 0)).token_ids == canary
    assert [key for key, outcome in outcomes.items() if not outcome.finish_reason] == []
    assert rig.is_idle()


def test_a_request_with_a_penalty_is_replayed_after_any_number_of_distinct_tokens(rig: RouterRig) -> None:
    penalty = ipb.Sampling(seed=1, presence_penalty=1.5, repetition_penalty=1.3)
    counts = (1, 63, 64, 65, 128, 256, 257)
    replays = [
        rig.submission(
            f"replay-{count}",
            sampling=penalty,
            choices=starts(0, output_ids=range(8, 8 + count)),
            stopping=ipb.Stopping(max_tokens=count + 4, ignore_eos=True),
        )
        for count in counts
    ]
    together = rig.ask(*replays)
    for replay in replays:
        (alone,) = rig.ask(replay).values()
        assert alone.failure is None
        assert alone.token_ids == together[replay.request_id, 0].token_ids
        assert len(alone.token_ids) == 4
        # What was given is penalised: a token of it would be drawn again only if all others were far less likely.
        (one_more,) = rig.ask(
            rig.submission(
                replay.request_id,
                sampling=penalty,
                choices=starts(0, output_ids=[*replay.choices[0].output_ids, alone.token_ids[0]]),
                stopping=replay.stopping,
            )
        ).values()
        assert one_more.token_ids == alone.token_ids[1:]
    assert rig.is_idle()


def test_an_id_that_is_running_is_refused_and_what_runs_goes_on(rig: RouterRig, canary: list[int]) -> None:
    first = rig.submission("canary", prompt_ids=[40, 41, 42, 43])
    again = rig.submission("canary", prompt_ids=[7], choices=starts(0, 1))
    outcomes = rig.ask(first, again)
    assert outcomes["canary", 0].token_ids[:1] == canary[:1] or not outcomes["canary", 0].token_ids
    refused = outcomes["canary", 1].failure
    assert refused is not None and refused.reason == "DUPLICATE_REQUEST_ID"
    assert refused.code == INVALID_ARGUMENT and "request_id 'canary'" in refused.message
    assert rig.is_idle()  # and none that nobody can name runs on


def test_frames_out_of_bounds_end_their_stream_and_no_other(rig: RouterRig, canary: list[int]) -> None:
    ref = pb.SequenceRef(request_id="r")
    for frame, field in (
        (pb.AttachRequest(gateway_id="g" * 129), "gateway_id"),
        (pb.AttachRequest(gateway_id="g" * 100_000), "gateway_id"),
        (pb.AttachRequest(gateway_id="line\nbreak"), "gateway_id"),
        (pb.AttachRequest(cancellations=[ref] * (MAX_FRAME_ITEMS + 1)), "cancellations"),
        (pb.AttachRequest(pauses=[ref] * (MAX_FRAME_ITEMS + 1)), "pauses"),
        (pb.AttachRequest(unpauses=[ref] * (MAX_FRAME_ITEMS + 1)), "unpauses"),
        (pb.AttachRequest(submissions=[pb.Submission()] * (MAX_FRAME_ITEMS + 1)), "submissions"),
    ):
        with pytest.raises(InvalidArgument, match=field) as refused:
            rig.talk(frame, wants=[("nobody", 0)])
        assert len(refused.value.message) < 300
    assert rig.ask(rig.submission("canary", prompt_ids=[40, 41, 42, 43]))["canary", 0].token_ids == canary
    assert rig.is_idle()


def test_references_to_nobody_are_passed_over_and_nothing_is_kept_of_them(rig: RouterRig, canary: list[int]) -> None:
    nobody = [
        *(pb.SequenceRef(request_id=f"nobody-{number}") for number in range(3000)),
        pb.SequenceRef(request_id="x" * 100_000),
        pb.SequenceRef(request_id="canary", choice_index=2**32 - 1),
        pb.SequenceRef(),
    ]
    outcomes = rig.talk(
        pb.AttachRequest(submissions=[rig.submission("canary", prompt_ids=[40, 41, 42, 43])]),
        pb.AttachRequest(pauses=nobody, cancellations=nobody, unpauses=nobody),
    )
    assert outcomes["canary", 0].token_ids == canary
    assert rig.is_idle()


def test_many_wrong_submissions_in_one_frame_are_refused_in_few_frames(rig: RouterRig) -> None:
    wrong = [rig.submission(f"wrong-{number}", prompt_ids=[]) for number in range(5000)]
    outcomes = rig.ask(*wrong)
    assert len(outcomes) == 5000  # more than an outbox holds frames


async def test_refusals_that_nobody_reads_end_the_stream_before_they_are_all_made(rig: RouterRig) -> None:
    outboxes = Outboxes(asyncio.get_running_loop())
    service = RouterService(outboxes)
    service.open(rig.engine.commands, rig.engine.listeners, rig.model, [1])
    rig.engine._news.deliver = outboxes.deliver
    owner, attached = outboxes.open()
    wrong = rig.submission("r" * 250, prompt_ids=[], choices=starts(*range(64)))
    before = rig.engine.commands.refused["INVALID_SUBMISSION"]
    service._take(rig.engine.commands, owner, pb.AttachRequest(submissions=[wrong] * 10_000))
    assert attached.is_cut
    assert rig.engine.commands.refused["INVALID_SUBMISSION"] - before < 5000
    assert attached.outbox.qsize() == 1


def _floats() -> st.SearchStrategy[float]:
    def of_bits(bits: int) -> float:
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])

    return st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, NAN, INF]) | st.integers(0, 2**32 - 1).map(of_bits)


_ids = st.sampled_from([0, 1, 9, VOCAB - 1]) | st.sampled_from([VOCAB, 2**32 - 1])
_good_ids = st.integers(0, VOCAB - 1)
_numbers = st.sampled_from([0, 1, 2, 5, 20, 21, 63, 64, 2**31, 2**32 - 1])
_few = st.sampled_from([0, 1, 2, 5])
_lists = st.lists(_good_ids, max_size=12) | st.lists(_ids, max_size=4)


def _message(kind: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


_sampling = _message(
    ipb.Sampling,
    temperature=_floats(),
    top_k=_numbers,
    top_p=_floats(),
    min_p=_floats(),
    repetition_penalty=_floats(),
    presence_penalty=_floats(),
    frequency_penalty=_floats(),
    seed=st.integers(0, 2**64 - 1),
)
_stopping = st.builds(
    ipb.Stopping,
    max_tokens=_few,
    min_tokens=_few | _numbers,
    ignore_eos=st.booleans(),
    stop_ids=_lists,
    stop_strings=st.lists(st.binary(max_size=4), max_size=1),
)
_start = _message(pb.ChoiceStart, choice_index=_few | _numbers, output_ids=_lists)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "request_id": st.sampled_from(["", "x" * 300, "é"]) | st.text(max_size=3),
    "prompt_ids": _lists,
    "sampling": _sampling,
    "stopping": _stopping,
    "choices": st.lists(_start, max_size=4),
    "num_logprobs": _few | _numbers,
    "is_score": st.booleans(),
    "traceparent": st.sampled_from(["", TRACEPARENT, "nonsense"]) | st.text(max_size=5),
    "deadline_ms": st.sampled_from([0, 600_000, 2**63, 2**64 - 1]),
    "caller": st.sampled_from([0, 1, 2, 2**64 - 1]),
}


@st.composite
def _a_submission(draw: st.DrawFn) -> pb.Submission:
    """Draw a good submission in which one to three fields are anything, or, rarely, all are."""
    anything = draw(st.sets(st.sampled_from(sorted(_fields)), min_size=1, max_size=3))
    if draw(st.integers(0, 9)) == 0:
        anything = set(_fields)
    good = {
        "request_id": "r",
        "prompt_ids": draw(st.lists(_good_ids, min_size=1, max_size=20)),
        "sampling": ipb.Sampling(seed=3),
        "stopping": ipb.Stopping(max_tokens=3),
        "choices": starts(0, 2),
    }
    return pb.Submission(**(good | {name: draw(_fields[name]) for name in sorted(anything)}))


_submission = _a_submission()
FIELDS = re.compile(
    r"(request_id|prompt_ids|sampling\.\w+|stopping\.\w+|choices(\[\d+\]\.\w+)?|num_logprobs|traceparent)\b"
)


def check_any_submissions(rig: RouterRig, canary: list[int], submissions: list[pb.Submission]) -> tuple[int, int]:
    """Send submissions with a canary; returns how many choices were served and refused."""
    for number, submission in enumerate(submissions):  # ids of their own, but for those that are out of bounds
        if 0 < len(submission.request_id) < 200:
            submission.request_id += f"-{number}"
    alone = rig.submission("canary", prompt_ids=[40, 41, 42, 43])
    outcomes = rig.ask(*submissions, alone)
    assert outcomes.pop(("canary", 0)).token_ids == canary
    for outcome in outcomes.values():
        if outcome.failure is not None:
            assert outcome.failure.code == INVALID_ARGUMENT, outcome.failure.message
            assert FIELDS.match(outcome.failure.message), outcome.failure.message
    assert rig.is_idle()
    num_refused = sum(outcome.failure is not None for outcome in outcomes.values())
    return len(outcomes) - num_refused, num_refused


def _with_unique_bad_ids(submissions: list[pb.Submission]) -> list[pb.Submission]:
    seen: set[str] = set()
    kept: list[pb.Submission] = []
    for submission in submissions:
        is_bad = not 0 < len(submission.request_id) < 200
        if not (is_bad and submission.request_id in seen):
            kept.append(submission)
        seen.add(submission.request_id)
    return kept


def test_any_submission_is_served_or_refused_by_name_and_the_canary_never_feels_it(
    rig: RouterRig, canary: list[int]
) -> None:
    served = refused = 0

    @settings(max_examples=25)
    @given(st.lists(_submission, min_size=1, max_size=6).map(_with_unique_bad_ids))
    def check(submissions: list[pb.Submission]) -> None:
        nonlocal served, refused
        more_served, more_refused = check_any_submissions(rig, canary, submissions)
        served += more_served
        refused += more_refused

    check()
    assert served > 20 and refused > 20  # both happen


@pytest.mark.soak
def test_thousands_of_any_submissions_are_served_or_refused(rig: RouterRig, canary: list[int]) -> None:
    @settings(max_examples=3000)
    @given(st.lists(_submission, min_size=1, max_size=8).map(_with_unique_bad_ids))
    def check(submissions: list[pb.Submission]) -> None:
        check_any_submissions(rig, canary, submissions)

    check()


def test_no_field_of_a_submission_is_without_a_row_above() -> None:
    known = {re.split(r"[.\[\\]", field)[0] for _, field in REFUSED} | {"is_score", "deadline_ms", "caller"}
    assert known == set(pb.Submission.DESCRIPTOR.fields_by_name)
    assert {field.split(".")[1] for _, field in REFUSED if field.startswith("sampling.")} | {"top_k", "seed"} == set(
        ipb.Sampling.DESCRIPTOR.fields_by_name
    )
    assert {field.split(".")[1] for _, field in REFUSED if field.startswith("stopping.")} | {"ignore_eos"} == set(
        ipb.Stopping.DESCRIPTOR.fields_by_name
    )


def test_wrong_sequences_are_told_as_invalid_arguments(rig: RouterRig) -> None:
    with pytest.raises(InvalidArgument, match="prompt_ids is empty") as error:
        sequences_of(rig.submission("r", prompt_ids=[]), 1, rig.model)
    assert (error.value.field, error.value.reason) == ("prompt_ids", "INVALID_SUBMISSION")
