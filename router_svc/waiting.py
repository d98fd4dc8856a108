"""Order the sequences that wait: whose turn it is to be admitted next.

Owns the waiting sequences, a line per request, and how many sequences of each request and caller run. Pure; looks at
no block and no budget. The caller with the fewest running sequences goes first, of its requests the one with the
fewest, and of these the one whose prompt is shortest, so that neither three hundred requests, sixty-four choices nor a
long document hold up everybody else. Every fourth admission goes to whoever came first, so that nobody waits for ever.
Requests of which all is paused, or waits for the choice that computes the common prompt, are set aside: an admission
costs O(log n) of n waiting requests, and a step looks at a bounded number of those set aside.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from router_svc.sequence import Sequence

FAIR_ADMISSIONS = 3  # by fewest running and shortest prompt, between two by arrival
# Admissions by which the first to arrive may be passed over when its blocks are not free; then all wait for it.
_PATIENCE = 32
_LOOKS = 16  # paused lines that a step looks at; all are looked at when nothing else can be done
_SPARE_ENTRIES = 64  # stale entries that a heap may hold beside one for each line


@dataclass(eq=False, slots=True)
class _Caller:
    """One caller: its requests that can be admitted."""

    key: tuple[int, int | str]
    num_running: int = 0
    num_lines: int = 0
    lines: "list[_Entry]" = field(default_factory=list)  # heap of (running, tokens, arrival, ticket, line)
    ticket: int = 0  # of its valid entry among the callers; 0: it has none


@dataclass(eq=False, slots=True)
class _Line:
    """One request: its waiting sequences in order of arrival."""

    key: tuple[int, str]
    caller: _Caller
    waiting: deque[Sequence] = field(default_factory=deque)
    num_running: int = 0
    ticket: int = 0  # of its valid entry in each heap; 0: it has none

    def next(self) -> Sequence | None:
        """The first that can be admitted."""
        return next((s for s in self.waiting if not (s.is_paused or s.waits_for_leader)), None)


_Entry = tuple[Any, ...]  # the key, the ticket when it was pushed, and the line or caller: tickets differ


class Waiting:
    """The waiting sequences. Owned by the scheduler."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], _Line] = {}  # with waiting or running sequences
        self._callers: dict[tuple[int, int | str], _Caller] = {}  # with lines
        self._by_arrival: list[_Entry] = []  # heap of (arrival, ticket, line)
        self._by_need: list[_Entry] = []  # heap of (running, its first line's running, tokens, arrival, ticket, caller)
        self._paused: dict[_Line, None] = {}
        self._led: dict[_Line, None] = {}  # their leaders run: so there are no more of them than running sequences
        self._num_ready = 0  # lines with a ticket
        self._arrivals, self._tickets = itertools.count(1), itertools.count(1)
        self._fair_left = FAIR_ADMISSIONS  # until the turn of the first to arrive; below zero: it was passed over
        self._num_sequences = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(line.waiting for line in self._lines.values())

    @property
    def num_callers(self) -> int:
        """Callers with waiting or running sequences."""
        return len(self._callers)

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence, behind those of its request."""
        sequence.arrival = next(self._arrivals)
        line = self._line_of(sequence)
        line.waiting.append(sequence)
        self._count(sequence, 1)
        if not line.ticket:
            self._queue(line)

    def put_back(self, sequence: Sequence) -> None:
        """Take back a sequence that ran, before those of its request that came later."""
        line = self._line_of(sequence)
        line.num_running -= 1
        line.caller.num_running -= 1
        at = next((i for i, other in enumerate(line.waiting) if other.arrival > sequence.arrival), len(line.waiting))
        line.waiting.insert(at, sequence)
        self._count(sequence, 1)
        self._queue(line)

    def admit(self, sequence: Sequence, *, is_turn_of_first: bool) -> None:
        """Take out a sequence that `next` named, because it runs now."""
        self._fair_left = FAIR_ADMISSIONS if is_turn_of_first else self._fair_left - 1
        line = self._line_of(sequence)
        line.num_running += 1
        line.caller.num_running += 1
        line.waiting.remove(sequence)
        self._count(sequence, -1)
        self._queue(line)

    def leave(self, sequence: Sequence, *, was_running: bool) -> None:
        """Forget a sequence that has ended. Nothing happens if it is not known."""
        line = self._lines.get(_key(sequence))
        if line is None:
            return
        if was_running:
            line.num_running -= 1
            line.caller.num_running -= 1
        elif sequence in line.waiting:
            line.waiting.remove(sequence)
            self._count(sequence, -1)
        self._queue(line)

    def look_again(self, *, everywhere: bool = False) -> bool:
        """Queue lines that were set aside and can go on by now. Returns whether there are any."""
        found = False
        for line in [*self._led, *itertools.islice(self._paused, None if everywhere else _LOOKS)]:
            self._queue(line)  # one that is still paused goes behind the others
            found |= bool(line.ticket)
        return found

    def revive(self, sequence: Sequence) -> None:
        """Queue the line of a sequence that is paused no more."""
        line = self._lines.get(_key(sequence))
        if line is not None and not line.ticket:
            self._queue(line)

    def next(self, *, is_passing: bool = False) -> tuple[Sequence, bool] | None:
        """Say who is to be admitted next, and whether it is the turn of the first to arrive; None: nobody can be.

        is_passing: pass over the first to arrive, if it is its turn and it has been passed over less often than
        `_PATIENCE`.
        """
        is_turn_of_first = self._fair_left <= 0
        if is_turn_of_first and is_passing:
            if self._fair_left <= -_PATIENCE:
                return None
            is_turn_of_first = False
        heap = self._by_arrival if is_turn_of_first else self._by_need
        while heap:
            *_, ticket, first = heap[0]
            if first.ticket != ticket:
                heapq.heappop(heap)
                continue
            line: _Line = first if is_turn_of_first else first.lines[0][-1]
            if (sequence := line.next()) is not None:
                return sequence, is_turn_of_first
            self._queue(line)  # paused since it was queued
        return None

    def _line_of(self, sequence: Sequence) -> _Line:
        key = _key(sequence)
        line = self._lines.get(key)
        if line is None:
            caller = self._callers.get(sequence.payer)
            if caller is None:
                caller = self._callers[sequence.payer] = _Caller(sequence.payer)
            caller.num_lines += 1
            line = self._lines[key] = _Line(key, caller)
        return line

    def _queue(self, line: _Line) -> None:
        """Give a line and its caller their places, by their present state: in the heaps, aside, or nowhere."""
        self._paused.pop(line, None)
        self._led.pop(line, None)
        self._num_ready -= bool(line.ticket)
        line.ticket = 0
        sequence = line.next()
        if sequence is not None:
            line.ticket = next(self._tickets)
            self._num_ready += 1
            self._push(self._by_arrival, (sequence.arrival, line.ticket, line))
            need = (line.num_running, sequence.size, sequence.arrival)
            self._push(line.caller.lines, (*need, line.ticket, line))
        elif line.waiting:
            (self._paused if all(s.is_paused for s in line.waiting) else self._led)[line] = None
        elif not line.num_running and self._lines.pop(line.key, None) is not None:
            line.caller.num_lines -= 1
        self._queue_caller(line.caller)

    def _queue_caller(self, caller: _Caller) -> None:
        caller.ticket = 0
        while caller.lines and caller.lines[0][-1].ticket != caller.lines[0][-2]:
            heapq.heappop(caller.lines)
        if caller.lines:
            caller.ticket = next(self._tickets)
            *need, _, _ = caller.lines[0]
            self._push(self._by_need, (caller.num_running, *need, caller.ticket, caller))
        elif not caller.num_lines:
            self._callers.pop(caller.key, None)

    def _push(self, heap: list[_Entry], entry: _Entry) -> None:
        heapq.heappush(heap, entry)
        if len(heap) > 2 * self._num_ready + _SPARE_ENTRIES:
            heap[:] = [(*key, ticket, item) for *key, ticket, item in heap if item.ticket == ticket]
            heapq.heapify(heap)

    def _count(self, sequence: Sequence, change: int) -> None:
        self._num_sequences += change
        self.num_tokens += change * sequence.size


def _key(sequence: Sequence) -> tuple[int, str]:
    return sequence.owner, sequence.request_id
