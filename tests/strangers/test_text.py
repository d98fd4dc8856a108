"""The text of answers equals the whole decoding of prompt and answer, for every kind of tokenizer and however it comes.

The oracle decodes everything again after each id. What is tried against it is a Generation: ids in batches of any size,
taken at any time, resumed on a fresh one at any point, with stop strings, stop tokens and min_tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway import detokenizer
from gateway.answer_text import AnswerText
from gateway.choice import Choice
from gateway.cleanup import Cleanup, clean_up
from gateway.decoding import Decoding
from gateway.detokenizer import Detokenizer, Fate
from gateway.generation import Generation
from gateway.requests import Accepted, Progress
from gateway.restore import restore
from gateway.stops import StopStrings
from gateway.tokenizer import Tokenizer
from tests.tokenizer_kinds import KINDS, SPECIAL, inner_of, mixed_ids, odd_ids, tokenizer_of


def num_alike(one: str, other: str) -> int:
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), min(len(one), len(other))
    )


def added(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Give what decode(prompt + answer) adds to decode(prompt)."""
    whole = tokenizer.decode([*prompt, *answer])
    return whole[num_alike(tokenizer.decode(prompt), whole) :]


@dataclass(frozen=True)
class Case:
    kind: str
    prompt: list[int]
    answer: list[int]
    stops: tuple[str, ...]
    min_tokens: int

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.kind)

    @property
    def stop_tokens(self) -> dict[int, str]:
        found = {self.tokenizer.special_id(stop): stop for stop in self.stops}
        return {token_id: stop for token_id, stop in found.items() if token_id is not None}


@dataclass(frozen=True)
class Ending:
    num_ids: int
    text: str
    reason: int
    stop: str = ""


def expected(case: Case) -> Ending:
    """Decode anew after each id, and look for stop strings that end in characters that no earlier id had brought."""
    before = [""]
    for num_ids, token_id in enumerate(case.answer if case.stops else (), start=1):
        text = added(case.tokenizer, case.prompt, case.answer[:num_ids])
        if num_ids >= case.min_tokens:
            if token_id in case.stop_tokens:
                return Ending(num_ids, text, pb.FINISH_REASON_STOP, case.stop_tokens[token_id])
            for end in range(max(num_alike(earlier, text) for earlier in before) + 1, len(text) + 1):
                matching = [stop for stop in case.stops if text[:end].endswith(stop)]
                if matching:
                    stop = max(matching, key=len)
                    return Ending(num_ids, text[: end - len(stop)], pb.FINISH_REASON_STOP, stop)
        if text != before[-1]:
            before.append(text)
    whole = added(case.tokenizer, case.prompt, case.answer)
    return Ending(len(case.answer), whole, pb.FINISH_REASON_LENGTH)


def draw_case(kind: str, random_: random.Random) -> Case:
    ids = mixed_ids(kind, random_)
    while len(ids) < 2:
        ids += mixed_ids(kind, random_)
    cut = random_.randrange(len(ids))
    prompt, answer = ids[:cut], ids[cut:]
    stops: list[str] = []
    if random_.random() < 0.5:
        text = added(tokenizer_of(kind), prompt, answer).replace("\ufffd", "")
        for _ in range(random_.randrange(1, 4)):
            start = random_.randrange(len(text) + 1)
            stops.append(text[start : start + random_.choice((1, 2, 3, 8))])
        if random_.random() < 0.4:
            stops.append(random_.choice(SPECIAL))
    min_tokens = random_.choice((0, 0, 1, 3, len(answer) // 2))
    return Case(kind, prompt, answer, tuple(filter(None, stops)), min_tokens)


def accepted_of(case: Case) -> Accepted:
    stopping = pb.Stopping(max_tokens=len(case.answer), min_tokens=case.min_tokens, stop_ids=case.stop_tokens)
    return Accepted(
        request_id="r",
        prompt_ids=tuple(case.prompt),
        sampling=pb.Sampling(seed=1),
        stopping=stopping,
        stop_strings=case.stops,
        stop_tokens=case.stop_tokens,
        num_choices=1,
        num_logprobs=0,
    )


class Caller:
    """Has a stream, breaks it, resumes it; checks that offsets leave no gap."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.token_ids: list[int] = []
        self.text = ""
        self.reason = pb.FINISH_REASON_UNSPECIFIED
        self.stop = ""
        self.generation = self.resume()

    def resume(self) -> Generation:
        """Go on with nothing but what was delivered, as on a gateway that knows nothing of the request."""
        case, accepted = self.case, accepted_of(self.case)
        prompt_end = case.tokenizer.prompt_end(case.prompt)
        choice = Choice(
            0,
            prompt_end=prompt_end,
            stops=StopStrings(accepted.stop_strings),
            stop_tokens=accepted.stop_tokens,
            min_tokens=case.min_tokens,
        )
        if self.token_ids:
            progress = Progress(token_ids=tuple(self.token_ids), text_offset=len(self.text), finish_reason=self.reason)
            for _ in restore([choice], {0: progress}, accepted, pb.Model(vocab_size=1 << 20)):
                pass
        self.generation = Generation(accepted, [choice], model="m")
        return self.generation

    def take(self) -> None:
        response = self.generation.take()
        for chunk in () if response is None else response.chunks:
            assert (chunk.token_offset, chunk.text_offset) == (len(self.token_ids), len(self.text))
            assert len(chunk.logprobs) == len(chunk.token_ids)
            self.token_ids += chunk.token_ids
            self.text += chunk.text
            self.reason, self.stop = chunk.finish_reason, chunk.stop_reason

    def run(self, random_: random.Random) -> Ending:
        while not self.reason:
            self.generation.take_news(self._news(random_))
            if random_.random() < 0.6:
                self.take()
            if random_.random() < 0.1 and not self.reason:
                self.resume()
                if self.generation.is_finished:
                    self.take()
        return Ending(len(self.token_ids), self.text, self.reason, self.stop)

    def _news(self, random_: random.Random) -> router_pb2.SequenceNews:
        # A router goes on from the ids that the submission names, wherever those come from.
        submission = self.generation.submission("s", deadline_ms=0, traceparent="")
        done = len(submission.choices[0].output_ids) if submission.choices else len(self.case.answer)
        ids = self.case.answer[done : done + random_.choice((1, 1, 2, 5, 40))]
        news = router_pb2.SequenceNews(choice_index=0)
        for token_id in ids:
            news.token_ids.append(token_id)
            news.logprobs.add(chosen=-1.0)
            done += 1
            if token_id in submission.stopping.stop_ids and done >= self.case.min_tokens:
                news.finish_reason, news.stop_id = pb.FINISH_REASON_STOP, token_id
                return news
        if done == len(self.case.answer):
            news.finish_reason = pb.FINISH_REASON_LENGTH
        return news


def check(kind: str, seed: str) -> None:
    random_ = random.Random(seed)
    case = draw_case(kind, random_)
    caller = Caller(case)
    assert caller.run(random_) == expected(case), (seed, case)
    assert caller.token_ids == case.answer[: len(caller.token_ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_the_whole_decoding_adds_to_the_prompts(kind: str) -> None:
    for number in range(75):
        check(kind, f"{kind} {number}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_the_whole_decoding_adds_in_thousands_of_cases(kind: str) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for number in range(2_000):
        check(kind, f"{kind} {first + number}")


# The same property fails where one of its reasons is taken away.


def answer_beside_prompt(case: Case) -> Ending:
    choice = Choice(0, prompt_end=case.tokenizer.prompt_end(()))
    choice.add(case.answer)
    choice.finish(pb.FINISH_REASON_LENGTH)
    chunk = choice.take()
    assert chunk is not None
    return Ending(len(chunk.token_ids), chunk.text, chunk.finish_reason)


def num_wrong(kind: str, run: Callable[[Case, random.Random], Ending], num_cases: int = 60) -> int:
    wrong = 0
    for number in range(num_cases):
        random_ = random.Random(f"{kind} {number}")
        case = draw_case(kind, random_)
        wrong += run(case, random_) != expected(case)
    return wrong


def told(case: Case, random_: random.Random) -> Ending:
    try:
        return Caller(case).run(random_)
    except AssertionError:  # offsets with gaps
        return Ending(-1, "", 0)


@pytest.mark.parametrize("kind", ["llama", "word_piece", "unigram", "bpe_suffix", "word_level"])
def test_answers_decoded_beside_their_prompts_are_seen_to_be_wrong(kind: str) -> None:
    assert num_wrong(kind, told) == 0
    assert num_wrong(kind, lambda case, _: answer_beside_prompt(replace(case, stops=()))) > 5


@pytest.mark.parametrize("kind", ["byte_level", "word_piece"])
def test_windows_without_context_are_seen_to_be_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenizer, "CONTEXT_IDS", 1)
    monkeypatch.setattr(detokenizer, "_MAX_WINDOW_IDS", 0)
    monkeypatch.setattr(Detokenizer, "_shorten", lambda self, _: (self._ids.clear(), setattr(self, "_base", "")))
    assert num_wrong(kind, told) > 5


@pytest.mark.parametrize("kind", ["llama", "unigram_bytes"])
def test_drafts_that_are_never_taken_back_are_seen_to_be_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = AnswerText._settle
    kept = {Fate.DROPPED: Fate.KEPT}
    monkeypatch.setattr(AnswerText, "_settle", lambda self, fate: settle(self, kept.get(fate, fate)))
    assert num_wrong(kind, told) > 5


def test_stop_tokens_that_are_forgotten_are_seen_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: Case, random_: random.Random) -> Ending:
        with monkeypatch.context() as patch:
            patch.setattr(Case, "stop_tokens", {})
            return told(case, random_)

    assert num_wrong("byte_level", run, num_cases=200) > 1


# What an answer costs.


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_in_an_answer_of_any_length(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, inner = tokenizer_of(kind), inner_of(kind)
    random_ = random.Random(1)
    hidden = inner.token_to_id("<s>")
    one = random_.randrange(inner.get_vocab_size() - 8)
    prompt = (mixed_ids(kind, random_) * 400)[:2000] + [hidden] * 2000
    runs = [[hidden] * 3000, [one] * 3000, odd_ids(kind, random_, 3000), mixed_ids(kind, random_) * 20]
    if (byte := inner.token_to_id("<0xD0>")) is not None:  # Cyrillic letters, each of two bytes, then a broken one
        runs += [[byte, byte - 0x20] * 1500, [byte] * 3000]
    decoded: list[int] = []
    text = Decoding.text

    def watched(self: Decoding, token_ids: Sequence[int]) -> str:
        decoded.append(len(token_ids))
        return text(self, token_ids)

    monkeypatch.setattr(Decoding, "text", watched)
    choice = Choice(0, prompt_end=tokenizer.prompt_end(prompt))
    assert sum(decoded) <= 64 * 64 or tokenizer._cleans_up
    for run in runs:
        decoded.clear()
        choice.add(run)
        assert max(decoded, default=0) <= 40
        assert len(decoded) <= 3 * len(run)


@pytest.mark.parametrize("kind", ["llama", "unigram_bytes"])
def test_a_prompt_that_ends_in_a_long_run_of_bytes_goes_on_as_a_short_one(kind: str) -> None:
    inner, random_ = inner_of(kind), random.Random(2)
    for number in range(60):
        data = "".join(random_.choices("яж🙂€é", k=random_.randrange(2, 60))).encode()
        data = data[: -random_.randrange(4) or None] + (b"\xff" if number % 7 == 0 else b"")
        ids = [inner.token_to_id(f"<0x{byte:02X}>") for byte in data]
        prompt = random_.choice(([], [inner.token_to_id("b")], odd_ids(kind, random_, 3))) + ids
        answer = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "🙂ж".encode()[random_.randrange(4) :]]
        answer += mixed_ids(kind, random_)[:6]
        case = Case(kind, prompt, answer, (), 0)
        assert Caller(case).run(random_) == expected(case), case


@given(st.lists(st.sampled_from([" ", ".", "?", "!", ",", "'", "n", "t", "m", "s", "ve", "re", "x", " ' ", " n't"])))
def test_cleaning_up_piece_by_piece_is_cleaning_up_the_whole(pieces: list[str]) -> None:
    cleanup = Cleanup()
    assert "".join(map(cleanup.feed, pieces)) + cleanup.flush() == clean_up("".join(pieces))
    assert not cleanup.is_holding
