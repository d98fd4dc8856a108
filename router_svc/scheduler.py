"""Form steps: which sequences compute how many rows next.

Owns the order of sequences and their use of KV blocks: iteration-level batching (Yu et al., Orca, OSDI 2022), chunked
prefill beside decode (Agrawal et al., Sarathi-Serve, OSDI 2024), preemption by recompute, prefix reuse. Pure: no clock,
no tensor, no
thread.
"""

import itertools
from dataclasses import dataclass

from router_svc.kv_blocks import BLOCK_TOKENS, BlockPool, num_blocks_for
from router_svc.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence's part of a step: compute `num_rows` tokens from `begin` on."""

    sequence: Sequence
    begin: int
    num_rows: int

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.begin + self.num_rows

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be drawn after this step."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass: decode rows first, then chunks."""

    decodes: tuple[Row, ...]
    chunks: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All parts in the order of the packed batch."""
        return self.decodes + self.chunks

    @property
    def num_rows(self) -> int:
        """Rows of the packed batch."""
        return len(self.decodes) + sum(row.num_rows for row in self.chunks)

    @property
    def kind(self) -> str:
        """What it holds: "decode", "prefill" or "mixed"."""
        return "mixed" if self.decodes and self.chunks else "decode" if self.decodes else "prefill"

    def split(self, num_parts: int) -> "list[Step]":
        """Part the packed batch into steps of as many rows each as can be, in its order; a chunk may be parted.

        Needs at least as many rows as parts. A later part of a chunk attends to what an earlier one stores.
        """
        bounds = [self.num_rows * part // num_parts for part in range(num_parts + 1)]
        decodes: list[list[Row]] = [[] for _ in range(num_parts)]
        chunks: list[list[Row]] = [[] for _ in range(num_parts)]
        at = 0
        for idx, row in enumerate(self.rows):
            for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
                first, last = max(begin, at), min(end, at + row.num_rows)
                if first < last:
                    piece = Row(sequence=row.sequence, begin=row.begin + first - at, num_rows=last - first)
                    (decodes if idx < len(self.decodes) else chunks)[part].append(piece)
            at += row.num_rows
        return [Step(decodes=tuple(d), chunks=tuple(c)) for d, c in zip(decodes, chunks, strict=True)]


class Scheduler:
    """Running sequences in order of arrival, and those that wait."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_num_seqs: int):
        self.pool = pool
        self._max_batch_tokens, self._max_num_seqs = max_batch_tokens, max_num_seqs
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Rows that waiting and partly computed prompts still need."""
        waiting, running = list(self._waiting), list(self._running)  # a page may ask from another thread
        return sum(s.num_remaining for s in waiting) + sum(s.num_remaining for s in running if not s.is_decoding)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self._waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out and give its blocks back. Nothing happens where it is out already."""
        if sequence.is_running:
            self._running.remove(sequence)
            sequence.is_running = False
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> Step | None:
        """Form the next step, or None where nothing can be computed.

        Running sequences go first, in order of arrival: each needs blocks for its rows, taken from the youngest by
        preemption where none are free. Then waiting ones are admitted while tokens and blocks last; nobody is preempted
        for them.
        """
        budget = self._max_batch_tokens
        decodes: list[Row] = []
        chunks: list[Row] = []
        for sequence in list(self._running):
            if budget == 0:
                break
            if sequence.is_paused or not sequence.is_running:
                continue
            num_rows = min(sequence.num_remaining, budget)
            if not self._make_room(sequence, num_rows):
                break  # it was the youngest and has given up its own
            self._extend(sequence, num_rows)
            row = Row(sequence=sequence, begin=sequence.num_computed, num_rows=num_rows)
            (decodes if sequence.is_decoding else chunks).append(row)
            budget -= num_rows
        budget = self._admit(chunks, budget)
        if not decodes and not chunks:
            return None
        return Step(decodes=tuple(decodes), chunks=tuple(chunks))

    def commit(self, step: Step) -> None:
        """Note that a step's rows are in the cache; full blocks become findable."""
        for row in step.rows:
            sequence = row.sequence
            if sequence.has_ended:
                continue
            before, sequence.num_computed = sequence.num_computed, row.end
            names = sequence.block_names(row.end)
            for idx in range(len(sequence.block_names(before)), len(names)):
                self.pool.name(sequence.blocks[idx], names[idx])

    def _admit(self, chunks: list[Row], budget: int) -> int:
        held: list[Sequence] = []  # passed over: paused, or waiting for another choice's prompt
        while self._waiting and budget > 0:
            sequence = self._waiting[0]
            if sequence.is_paused or sequence.waits_for_leader:
                held.append(self._waiting.pop(0))
                continue
            found = [] if sequence.is_score else self.pool.find(sequence.block_names(sequence.num_tokens - 1))
            num_cached = len(found) * BLOCK_TOKENS
            num_rows = min(sequence.num_tokens - num_cached, budget)
            # Room for all its tokens, not this chunk's alone: half a prompt that must give way was computed in vain.
            lacking = num_blocks_for(sequence.num_tokens) - len(found) + self.pool.num_unheld(found)
            if len(self._running) >= self._max_num_seqs or not self.pool.can_allocate(lacking):
                if not self._preempt_paused():
                    break
                continue
            self.pool.share(found)
            sequence.blocks = list(found)
            sequence.num_computed = num_cached
            if not sequence.num_preemptions:
                sequence.num_cached = min(num_cached, len(sequence.prompt_ids))
                self.num_cached_tokens += sequence.num_cached
            self._extend(sequence, num_rows)
            self._running.append(self._waiting.pop(0))
            sequence.is_running = True
            chunks.append(Row(sequence=sequence, begin=num_cached, num_rows=num_rows))
            budget -= num_rows
        self._waiting[:0] = held
        return budget

    def _preempt_paused(self) -> bool:
        """Take the place and the blocks of a sequence whose reader has stalled; False where there is none."""
        stalled = next((s for s in self._running if s.is_paused), None)
        if stalled is not None:
            self._preempt(stalled)
        return stalled is not None

    def _make_room(self, sequence: Sequence, num_rows: int) -> bool:
        """Free blocks for more rows of a running sequence; False where it had to give up its own."""
        while not self.pool.can_allocate(sequence.num_new_blocks(num_rows)):
            victim = next((s for s in reversed(self._running) if s.is_paused), self._running[-1])
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.is_running = False
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.insert(0, sequence)

    def _extend(self, sequence: Sequence, num_rows: int) -> None:
        sequence.blocks += self.pool.allocate(sequence.num_new_blocks(num_rows))

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
