"""A caller that does nothing wrong: short requests without end, each answer held against the one that it must be.

Owns one thread and one client. What it saw is read by the test: whether every answer was right, and how long each took.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from collegium.client import Client

MAX_TOKENS = 4
_TIMEOUT_S = 90.0
_CHECK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with its seed; None: greedy."""

    prompt_ids: tuple[int, ...]
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request of the canary, on the monotonic clock. error: empty if the answer was the right one."""

    began_s: float
    ended_s: float
    error: str

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_s - self.began_s


QUESTIONS = tuple(
    Question(prompt_ids=tuple(range(first, first + 6)), seed=seed)
    for first, seed in ((11, None), (40, 1), (90, None), (130, 2))
)


def ask(client: Client, question: Question) -> tuple[int, ...]:
    """Put one question and return the ids of the answer."""
    answer = client.complete(
        prompt_ids=question.prompt_ids,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        temperature=0.0 if question.seed is None else 0.9,
        seed=question.seed or 0,
    )
    return tuple(answer.choices[0].token_ids)


class Canary:
    """Asks until closed. The first round, before anybody attacks, says what the right answers are."""

    def __init__(self, targets: Sequence[str], *, pause_s: float = 0.01) -> None:
        self._pause_s = pause_s
        self._client = Client(targets, timeout_s=_TIMEOUT_S)
        self._right = {question: ask(self._client, question) for question in QUESTIONS}
        self._visits: list[Visit] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End after the request that is under way."""
        self._is_over = True
        self._client.close()
        self._thread.join(_TIMEOUT_S)

    def visits(self, began_s: float, ended_s: float = float("inf")) -> list[Visit]:
        """List the requests that were under way at any moment between two times."""
        with self._changed:
            return [one for one in self._visits if one.ended_s >= began_s and one.began_s <= ended_s]

    def wait_for(self, num_visits: int, limit_s: float, check: Callable[[], None] = lambda: None) -> list[Visit]:
        """Wait until so many requests that begin from now on have ended; return these.

        check: called now and then; what it raises ends the wait.
        """
        now_s = time.monotonic()

        def new() -> list[Visit]:
            return [one for one in self._visits if one.began_s >= now_s]

        while time.monotonic() < now_s + limit_s:
            check()
            with self._changed:
                if self._changed.wait_for(lambda: len(new()) >= num_visits, _CHECK_EVERY_S):
                    return new()
        raise AssertionError(f"the canary got {len(new())} of {num_visits} answers within {limit_s:g} s")

    def _run(self) -> None:
        at = 0
        while not self._is_over:
            question, at = QUESTIONS[at % len(QUESTIONS)], at + 1
            began_s, error = time.monotonic(), ""
            try:
                answer = ask(self._client, question)
                if answer != self._right[question]:
                    error = f"{question} was answered {answer}, not {self._right[question]}"
            except Exception as raised:
                error = f"{question}: {type(raised).__name__}: {raised}"
            if self._is_over:
                return
            with self._changed:
                self._visits.append(Visit(began_s=began_s, ended_s=time.monotonic(), error=error))
                self._changed.notify_all()
            time.sleep(self._pause_s)


def median_s(visits: Sequence[Visit]) -> float:
    """Return the median time of requests."""
    return statistics.median(one.seconds for one in visits)


def p99_s(visits: Sequence[Visit]) -> float:
    """Return the time that one request in a hundred exceeds."""
    times = sorted(one.seconds for one in visits)
    return times[min(len(times) - 1, int(len(times) * 0.99))]
