"""The text of answers equals the whole decoding of prompt and answer, for every kind of tokenizer and however it comes.

The oracle decodes everything again after each id. What is tried against it is a Generation: ids in batches of any size,
taken at any time, resumed on a fresh one at any point, with stop strings, stop tokens and min_tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway.choice import Choice
from gateway.generation import Generation
from gateway.restore import restore
from gateway.stops import StopStrings
from gateway.tokenizer import Tokenizer
from gateway.validation import Accepted, Progress
from tests.tokenizer_kinds import KINDS, SPECIAL, mixed_ids, tokenizer_of


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
    for number in range(80):
        check(kind, f"{kind} {number}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_the_whole_decoding_adds_in_thousands_of_cases(kind: str) -> None:
    first = random.SystemRandom().randrange(1 << 40)
    for number in range(2_000):
        check(kind, f"{kind} {first + number}")
