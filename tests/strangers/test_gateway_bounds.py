"""What one caller of a gateway costs: memory in proportion to the request, time of its own, and nothing afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway import app as app_module
from gateway import service as service_module
from gateway.generation import Generation
from gateway.stops import StopMatcher, StopStrings
from gateway.text_process import TextProcess
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter, expected, model
from tests.gateway_rig import DEMO, Rig, error_of, gather, ids_request, rig, text_request, token_ids, until

LONG_STOPS = [bytes([97 + index]) * 1000 + b"z" for index in range(16)]


@pytest.fixture
async def router() -> FakeRouter:
    return FakeRouter()


@contextmanager
def memory_grows_by_at_most(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= num_bytes, f"{peak / 2**20:.1f} MiB"


# Cost that is a product of fields each of which is in bounds.


def test_stop_strings_cost_memory_in_proportion_to_themselves_for_any_number_of_choices() -> None:
    strings = [stop.decode() for stop in LONG_STOPS]
    with memory_grows_by_at_most(2**20):
        stops = StopStrings(strings)
        matchers = [StopMatcher(stops) for _ in range(64)]
        for matcher in matchers:
            assert matcher.feed("a" * 900) == ("", None)
    assert matchers[0].feed("a" * 100 + "z") == ("", strings[0])


def naive(stops: list[str], text: str) -> tuple[str, str | None]:
    """The stop string that ends first, of those the longest; found by looking everywhere."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5),
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
)
@settings(max_examples=300)
def test_stop_strings_are_found_as_by_looking_everywhere(stops: list[str], pieces: list[str]) -> None:
    matcher, out, found = StopMatcher(StopStrings(stops)), "", None
    for piece in pieces:
        text, found = matcher.feed(piece)
        out += text
        if found:
            break
        # What is held back could still become a stop string, and is the longest such end of the text.
        so_far = "".join(pieces)[: len(out) + len(matcher._held)]
        open_ends = [so_far[i:] for i in range(len(so_far)) if any(s.startswith(so_far[i:]) for s in stops)]
        assert matcher._held == (open_ends[0] if open_ends else "")
    assert (out + matcher.flush(), found) == naive(stops, "".join(pieces))


async def test_a_request_of_many_choices_and_long_stop_strings_takes_little(router: FakeRouter) -> None:
    stopping = pb.Stopping(max_tokens=4, stop_strings=LONG_STOPS, stop_ids=range(100, 356))
    async with rig(router) as served:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2]), num_choices=64, stopping=stopping, num_logprobs=20
        )
        await gather(served.stub.Generate(request))  # what is made once is not counted
        with memory_grows_by_at_most(20 * 2**20):
            for _ in range(3):
                await gather(served.stub.Generate(request))


async def test_resume_with_much_progress_gives_others_their_turn(router: FakeRouter) -> None:
    long_model = model(max_model_len=20_000)
    router.model = long_model
    turns: list[int] = []

    async def count() -> None:
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    async with rig(router) as served:
        output = [5 + index % 50 for index in range(9_000)]
        progress = [pb.ChoiceProgress(choice_index=index, token_ids=output, text_offset=0) for index in range(4)]
        request = ids_request(1, 2, max_tokens=9_001, num_choices=4, sampling=pb.Sampling(seed=1))
        counting = asyncio.create_task(count())
        call = served.stub.Resume(pb.ResumeRequest(request=request, progress=progress))
        await router.until(lambda: len(router.submissions) == 1)
        counting.cancel()
        assert len(turns) > 4 * 9_000 / 256
        call.cancel()


# State that would wait for the cycle collector.


@pytest.mark.parametrize("ending", ["well", "error", "caller gone", "resumed and gone"])
async def test_a_request_that_has_ended_is_freed_at_once(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    seen: list[weakref.ref[Generation]] = []

    class Watched(Generation):
        def __init__(self, *args: object, **fields: object) -> None:
            super().__init__(*args, **fields)  # type: ignore[arg-type]
            seen.append(weakref.ref(self))

    monkeypatch.setattr(service_module, "Generation", Watched)
    async with rig(router) as served:
        gc.collect()
        gc.disable()
        try:
            await _ended(ending, served, router)
            await until(lambda: not served.gateway.service.running())
            await until(lambda: all(ref() is None for ref in seen))
        finally:
            gc.enable()
    assert seen


async def _ended(ending: str, served: Rig, router: FakeRouter) -> None:
    if ending == "well":
        await gather(served.stub.Generate(ids_request(1, num_choices=3)))
        return
    router.hold()
    if ending == "error":
        call = served.stub.Generate(ids_request(1))
        await router.until(lambda: len(router.sequences) == 1)
        router.failure = failure(grpc.StatusCode.INTERNAL)
        router.release()
        assert (await error_of(call)).code == grpc.StatusCode.INTERNAL
        return
    request = ids_request(1, sampling=pb.Sampling(seed=3))
    progress = [pb.ChoiceProgress(token_ids=[5, 6], text_offset=0)]
    call = (
        served.stub.Generate(request)
        if ending == "caller gone"
        else served.stub.Resume(pb.ResumeRequest(request=request, progress=progress))
    )
    await router.until(lambda: len(router.sequences) == 1)
    call.cancel()
    await router.until(lambda: not router.sequences)


def failure(code: grpc.StatusCode) -> router_pb2.Failure:
    return router_pb2.Failure(code=code.value[0], message="no", reason="NO")


# Limits that are checked before the work that they bound.


async def test_a_text_too_long_for_the_model_is_refused_before_it_is_tokenised(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", no_work)
    monkeypatch.setattr(TextProcess, "encode", no_work)
    async with rig(router) as served:
        for call in (
            served.stub.Generate(text_request(b"x" * (4 * 2**20 - 4096))),
            served.stub.Score(pb.ScoreRequest(text=b"x" * 2**21)),
        ):
            error = await error_of(call)
            assert (error.reason, error.field) == ("PROMPT_TOO_LONG", "text")


async def test_a_gateway_that_is_full_tokenises_nothing(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(router, max_requests=1) as served:
        router.hold()
        call = served.stub.Generate(ids_request(1))
        await router.until(lambda: len(router.sequences) == 1)
        monkeypatch.setattr(Tokenizer, "encode", no_work)
        error = await error_of(served.stub.Generate(text_request("hello")))
        assert error.reason == "REQUESTS_EXHAUSTED"
        call.cancel()


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("this should not have been begun")


async def test_one_caller_of_many_choices_leaves_room_for_another(router: FakeRouter) -> None:
    async with rig(router, max_sequences=100) as served:
        router.hold()
        first = served.stub.Generate(ids_request(1, num_choices=64))
        await router.until(lambda: len(router.sequences) == 64)
        assert (await error_of(served.stub.Generate(ids_request(1, num_choices=64)))).reason == "SEQUENCES_EXHAUSTED"
        other = asyncio.ensure_future(gather(served.stub.Generate(ids_request(9, max_tokens=2))))
        await router.until(lambda: len(router.sequences) == 65)
        router.release()
        assert token_ids(await other) == expected([9], 2)
        first.cancel()


# Templates and tokenizers that do not end, do not fit, or fail.

TEMPLATES = {
    "recursion": "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "a gigabyte": "{{ 'x' * 1000000000 }}",
    "a gigabyte in pieces": "{% set n = namespace(s='x') %}"
    "{% for a in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a power": "{{ 9 ** 99999999 }}",
    "a wide format": "{{ '%0900000000d' % 1 }}",
    "a wide filter": "{{ 'x' | center(900000000) }}",
    "a constant in a condition": "{% if 'x' | center(900000000) | length > 8 %}{% endif %}{{ 7 ** 7 ** 7 ** 7 }}",
}


@pytest.fixture
async def hostile(router: FakeRouter, tmp_path: Path) -> AsyncIterator[Rig]:
    """A gateway whose template does what the conversation's first message names."""
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    branches = [f"{{% if messages[0].content == '{name}' %}}{body}{{% endif %}}" for name, body in TEMPLATES.items()]
    (tmp_path / "chat_template.jinja").write_text("".join(branches) + "ok {{ messages[0].content }}")
    async with rig(router, model_dir=tmp_path, text_limit_s=0.5, text_memory=128 * 2**20) as served:
        yield served


def chat(content: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content=content.encode())]
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=messages), stopping=pb.Stopping(max_tokens=2))


async def test_a_template_that_does_not_end_or_fit_is_told_as_the_templates_and_others_go_on(hostile: Rig) -> None:
    for name in TEMPLATES:
        call = asyncio.ensure_future(error_of(hostile.stub.Generate(chat(name))))
        assert len(token_ids(await gather(hostile.stub.Generate(text_request("hello", max_tokens=2))))) == 2
        error = await call
        assert (name, error.code) == (name, grpc.StatusCode.INVALID_ARGUMENT)
        assert "chat template" in error.message, name
        assert error.field == "chat.messages"
    assert len(token_ids(await gather(hostile.stub.Generate(chat("hi"))))) == 2


async def test_a_caller_who_leaves_ends_the_work_for_its_prompt(router: FakeRouter, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["loops"])
    async with rig(router, model_dir=tmp_path, text_limit_s=3600.0) as served:
        call = served.stub.Generate(chat("loop"))
        await until(lambda: served.gateway.admission.num_requests == 1)
        call.cancel()
        await until(lambda: served.gateway.admission.num_requests == 0)
        again = served.stub.Generate(chat("loop"))
        await until(lambda: served.gateway.admission.num_requests == 1)
        again.cancel()
        await until(lambda: served.gateway.admission.num_requests == 0)


async def test_texts_that_wait_are_bounded_in_bytes(router: FakeRouter, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["loops"])
    async with rig(router, model_dir=tmp_path, text_limit_s=3600.0, text_memory=16 * 2**20) as served:
        admission = served.gateway.admission
        calls = [served.stub.Generate(chat("x" * 3 * 2**20)) for _ in range(2)]
        first = asyncio.wait([asyncio.ensure_future(error_of(call)) for call in calls], return_when="FIRST_COMPLETED")
        (refused,), (other,) = await first
        assert refused.result().reason == "TEXTS_EXHAUSTED"
        assert refused.result().retry_after_s
        for call in calls:
            call.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await until(lambda: admission.num_requests == 0)


class PanicException(BaseException):
    """As pyo3's, which is no Exception either, and is known by its name."""


class Failing:
    """A tokenizer of the library that fails on one text and on one id, by what the library raises."""

    def __init__(self, inner: tokenizers.Tokenizer, kind: type[BaseException], poison: int) -> None:
        self._inner, self._kind, self._poison = inner, kind, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, **options: Any) -> tokenizers.Encoding:
        if text == "poison":
            raise self._kind("index out of bounds")
        return self._inner.encode(text, **options)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        if self._poison in ids:
            raise self._kind("index out of bounds")
        return self._inner.decode(ids, **options)


@pytest.mark.parametrize("kind", [PanicException, RuntimeError])
async def test_a_tokenizer_that_fails_on_one_text_or_answer_fails_that_request_alone(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    poison = expected([1], 1)[0]
    inner = Failing(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), kind, poison)
    monkeypatch.setattr(app_module.Tokenizer, "load", lambda _: Tokenizer(inner))  # type: ignore[arg-type]
    async with rig(router) as served:
        error = await error_of(served.stub.Generate(text_request("poison")))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKENIZER")
        router.hold()
        bad = served.stub.Generate(ids_request(1, max_tokens=9))
        good = served.stub.Generate(ids_request(2, max_tokens=9))
        reading = asyncio.gather(error_of(bad), gather(good))
        await router.until(lambda: len(router.sequences) == 2)
        router.release()
        error, responses = await reading
        assert error.code == grpc.StatusCode.INTERNAL
        assert token_ids(responses) == expected([2], 9)
        await until(lambda: not router.sequences)


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a*a*b|."}, "behavior": "Isolated", "invert": False}),
    ],
)
async def test_a_checkpoints_own_patterns_are_bounded_for_short_texts_too(
    router: FakeRouter, tmp_path: Path, part: str, step: dict[str, object]
) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    name = "normalizers" if part == "normalizer" else "pretokenizers"
    steps = [step] * 4 if part == "normalizer" else [step, tokenizer["pre_tokenizer"]]
    tokenizer[part] = {"type": "Sequence", name: steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    async with rig(router, model_dir=tmp_path, text_limit_s=0.5, text_memory=128 * 2**20) as served:
        hostile = "aaaa" if part == "normalizer" else "a" * 4000
        call = asyncio.ensure_future(error_of(served.stub.Generate(text_request(hostile))))
        assert len(token_ids(await gather(served.stub.Generate(ids_request(5, max_tokens=2))))) == 2
        error = await call
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOKENIZER")
        assert len(token_ids(await gather(served.stub.Generate(text_request("hi", max_tokens=2))))) == 2
