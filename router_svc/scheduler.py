"""Form steps: which sequences compute how many rows next.

Owns the running sequences and their use of KV blocks: iteration-level batching (Yu et al., Orca, OSDI 2022), chunked
prefill beside decode (Agrawal et al., Sarathi-Serve, OSDI 2024), preemption by recompute, prefix reuse. Pure: no clock,
no tensor, no thread.
Decoding sequences get their rows first. What is left of a step's budget goes to prompts, the shortest first, running or
waiting; a quarter of it is the oldest prompt's, so that a long one is computed whatever comes after it.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence as Seq

from router_svc.kv_blocks import BLOCK_TOKENS, BlockPool, num_blocks_for
from router_svc.news import Load
from router_svc.pace import LEAST_ROWS
from router_svc.sequence import Sequence
from router_svc.step import Row, Step
from router_svc.waiting import Waiting

_OLDEST_SHARE = 4  # of the rows for prompts, one in so many is the oldest prompt's


class Scheduler:
    """Running sequences in the order in which they were admitted, and those that wait."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_num_seqs: int):
        self.pool = pool
        self._max_batch_tokens, self._max_num_seqs = max_batch_tokens, max_num_seqs
        self._running: list[Sequence] = []
        self._waiting = Waiting()
        self.at_hand: Sequence | None = None  # whom `schedule` looked at last: whose fault it is, if it fails
        self.num_preemptions = 0
        self.num_shortened = 0  # steps that had fewer prompt rows because several callers are served
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
        running = list(self._running)  # a page may ask from another thread
        return self._waiting.num_tokens + sum(s.num_remaining for s in running if not s.is_decoding)

    def load(self) -> Load:
        """Say how busy the router is; exact from the engine's thread, approximate from others."""
        return Load(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            waiting_tokens=self.num_waiting_tokens,
            free_blocks=self.pool.num_free,
            total_blocks=self.pool.num_blocks,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its request."""
        self._waiting.add(sequence)

    def pause(self, sequence: Sequence, *, is_paused: bool) -> None:
        """Hold a sequence, or let it go on."""
        sequence.is_paused = is_paused
        if not is_paused:
            self._waiting.revive(sequence)

    def end(self, sequence: Sequence, *, has_failed: bool = False) -> None:
        """Take a sequence out and give its blocks back. Nothing happens where it is out already.

        has_failed: its blocks may be the reason, those that it found in the cache too: nobody finds them any more.
        """
        was_running, sequence.is_running = sequence.is_running, False
        try:
            if has_failed:
                self.pool.forget([*sequence.source_blocks, *itertools.chain.from_iterable(sequence.tables)])
            self._release(sequence)
        finally:
            if was_running:
                self._running.remove(sequence)
            self._waiting.leave(sequence, was_running=was_running)

    def schedule(self, shared_rows: int | None = None) -> Step | None:
        """Form the next step, or None where nothing can be computed.

        shared_rows: its bound while several callers are served; a decoding sequence has its row all the same.
        Blocks for the rows of running sequences are taken from the youngest by preemption where none are free. Waiting
        ones are admitted while places and blocks last; paused ones are preempted for them, and, for a place, those of
        a caller that has at least two more than theirs.
        """
        self.at_hand = None
        self._waiting.look_again()
        is_bounded = shared_rows is not None and self._waiting.num_callers > 1
        max_rows = min(self._max_batch_tokens, shared_rows) if is_bounded else self._max_batch_tokens
        decoding, planned = self._plan(max_rows)
        if not planned and self._waiting.look_again(everywhere=True):
            decoding, planned = self._plan(max_rows)
        if not planned:
            return None
        decodes = [
            Row(sequence=s, begin=s.num_computed, num_rows=1, beam=beam)
            for s in decoding
            for beam in range(planned.pop(s, 0))
        ]
        prompts = sorted(planned, key=lambda s: s.arrival)
        chunks = [
            Row(
                sequence=s,
                begin=s.num_computed,
                num_rows=(planned[s] - s.num_unencoded) // s.width,
                encodes=bool(s.num_unencoded) and not beam,
                beam=beam,
            )
            for s in prompts
            for beam in range(s.width)
        ]
        return Step(decodes=tuple(decodes), chunks=tuple(chunks))

    def commit(self, step: Step) -> None:
        """Note that a step's rows are in the cache; full blocks become findable."""
        for row in step.rows:
            self.commit_row(row)

    def commit_row(self, row: Row) -> None:
        """Note that one sequence's rows are in the cache."""
        sequence = row.sequence
        if sequence.has_ended:
            return
        if row.encodes:
            sequence.is_encoded = True
            for block, name in zip(sequence.source_blocks, sequence.source_names(), strict=True):
                self.pool.name(block, name)
        before, sequence.num_computed = sequence.num_computed, row.end
        if before // BLOCK_TOKENS == row.end // BLOCK_TOKENS:  # no block has become full
            return
        if sequence.beams is not None and sequence.beams.beams:  # its tables are of tokens that may yet be given up
            return
        names = sequence.block_names(row.end)
        for idx in range(len(sequence.block_names(before)), len(names)):
            self.pool.name(sequence.blocks[idx], names[idx])

    def _plan(self, max_rows: int) -> tuple[list[Sequence], dict[Sequence, int]]:
        """Say how many rows each sequence gets in the next step, and give it the blocks for them.

        Returns the decoding sequences, and the rows of all that have any.
        """
        while True:
            num_preemptions = self.num_preemptions
            decoding: list[Sequence] = []
            prompts: list[Sequence] = []
            for sequence in self._running:
                if not sequence.is_paused:
                    (decoding if sequence.is_decoding else prompts).append(sequence)
            planned: dict[Sequence, int] = {}
            num_decodes = 0
            for sequence in decoding:
                if not planned or num_decodes + sequence.width <= self._max_batch_tokens:
                    planned[sequence] = sequence.width
                    num_decodes += sequence.width
            room = self._max_batch_tokens - num_decodes
            budget = min(room, max(max_rows - num_decodes, LEAST_ROWS))
            self._plan_prompts(planned, prompts, budget, room)
            is_shortened = budget < room and sum(planned.values()) == num_decodes + budget
            for sequence in list(self._running):  # the oldest first: it takes blocks from the youngest
                if sequence in planned:
                    self._allocate(sequence, planned)
            if planned or self.num_preemptions == num_preemptions:
                self.num_shortened += is_shortened
                return decoding, planned

    def _plan_prompts(self, planned: dict[Sequence, int], prompts: list[Sequence], budget: int, room: int) -> None:
        """Share out the rows for prompts: running ones, the oldest first in the list, and those that are admitted.

        All beams of a search go on together, beyond the budget if need be, but not beyond the room, which is kept for
        the oldest.
        """
        if budget <= 0 or (prompts and prompts[0].width > room):
            return
        share = max(1, budget // _OLDEST_SHARE)
        unplanned: list[tuple[int, int, Sequence]] = []  # heap of (rows lacking, tie, sequence)

        def plan(sequence: Sequence, lacking: int, most: int) -> None:
            nonlocal budget, room
            if sequence.width > room:  # its turn comes once it is the oldest
                return
            num_rows = min(lacking, most, budget)
            if sequence.num_unencoded and sequence not in planned:
                # A source is encoded whole, whatever is left of the budget, and a row of the sequence's own with it.
                num_rows = max(num_rows, sequence.num_unencoded + sequence.width)
            if sequence.width > 1:
                own = num_rows - (0 if sequence in planned else sequence.num_unencoded)
                num_rows += max(own - own % sequence.width, min(lacking, sequence.width)) - own
            planned[sequence] = planned.get(sequence, 0) + num_rows
            budget -= num_rows
            room -= num_rows
            if num_rows < lacking:
                heapq.heappush(unplanned, (lacking - num_rows, sequence.arrival, sequence))

        if prompts:
            plan(prompts[0], prompts[0].num_remaining, share)
            for sequence in prompts[1:]:
                heapq.heappush(unplanned, (sequence.num_remaining, sequence.arrival, sequence))
        can_admit, is_passing, reserved = len(self._waiting) > 0, False, -1
        while budget > 0 and (unplanned or can_admit):
            turn = self._waiting.next(is_passing=is_passing) if can_admit else None
            if turn is None:
                can_admit = False
            elif turn[1] or not unplanned or self._num_lacking(turn[0]) < unplanned[0][0]:
                sequence, is_turn_of_first = turn
                if reserved < 0:  # for rows that running sequences are planned, or need to be of use at all
                    reserved = sum(s.num_new_blocks(s.num_own) for s in self._running if not s.is_paused)
                if self._admit(sequence, reserved, planned, is_turn_of_first=is_turn_of_first):
                    plan(sequence, sequence.num_remaining, share if is_turn_of_first else budget)
                    reserved += sequence.num_new_blocks(sequence.num_own)
                elif is_turn_of_first and not is_passing:
                    is_passing = True
                else:
                    can_admit = False
                continue
            if unplanned:
                lacking, _, sequence = heapq.heappop(unplanned)
                plan(sequence, lacking, budget)

    def _find(self, sequence: Sequence) -> list[int]:
        """List the blocks of a waiting sequence that are in the cache."""
        self.at_hand = sequence
        is_search = sequence.beams is not None and bool(sequence.beams.beams)  # what is found is one beam's alone
        return [] if sequence.is_score or is_search else self.pool.find(sequence.block_names(sequence.num_tokens - 1))

    def _num_lacking(self, sequence: Sequence) -> int:
        """Rows that a waiting sequence needs before its next token."""
        rows = sequence.num_tokens - len(self._find(sequence)) * BLOCK_TOKENS
        return rows if self._find_source(sequence) else rows + len(sequence.source_ids)

    def _find_source(self, sequence: Sequence) -> list[int]:
        """List the blocks of a waiting sequence's source if they are all in the cache."""
        names = sequence.source_names()
        found = self.pool.find(names)
        return found if len(found) == len(names) else []

    def _admit(
        self, sequence: Sequence, reserved: int, planned: dict[Sequence, int], *, is_turn_of_first: bool
    ) -> bool:
        """Give a waiting sequence a place and what the cache has of it, if a place and the other blocks are free.

        reserved: blocks that running sequences will take. Paused sequences are preempted for it, and for a place one
        of a caller that has more; it loses its planned row. Returns whether the sequence was admitted.
        """
        while True:
            found = self._find(sequence)
            source = self._find_source(sequence)
            held = found + source
            # Room for all its tokens, not this chunk's alone: half a prompt that must give way was computed in vain.
            wanted = num_blocks_for(sequence.num_tokens) * sequence.width + num_blocks_for(len(sequence.source_ids))
            lacking = wanted - len(held) + self.pool.num_unheld(held)
            if len(self._running) < self._max_num_seqs and self.pool.can_allocate(lacking + reserved):
                break
            has_place = len(self._running) < self._max_num_seqs
            if not self._preempt_paused() and (has_place or not self._preempt_of_most(sequence, planned)):
                return False
        self._waiting.admit(sequence, is_turn_of_first=is_turn_of_first)
        self._running.append(sequence)
        sequence.is_running = True
        self.pool.share(held)
        sequence.blocks = list(found)
        sequence.is_encoded = bool(source)
        sequence.source_blocks = source or self.pool.allocate(num_blocks_for(len(sequence.source_ids)))
        sequence.num_computed = len(found) * BLOCK_TOKENS
        if not sequence.num_preemptions:
            sequence.num_cached = min(sequence.num_computed, len(sequence.prompt_ids))
            self.num_cached_tokens += sequence.num_cached
        return True

    def fork(self, sequence: Sequence, parents: Seq[int], tables: Seq[list[int]]) -> list[tuple[int, int]]:
        """Give each new beam of a sequence the blocks of the one that it goes on from, out of the tables before.

        Full blocks are shared. A last one that is not full is for one beam alone: the others get copies, as (from, to),
        which are to be made at once. Where there are no blocks for these, the sequence is preempted.
        """
        beams = sequence.tables
        for table, parent in zip(beams, parents, strict=True):
            table[:] = tables[parent]
            self.pool.share(table)
        for table in tables:
            self.pool.release(table)
        copies: list[tuple[int, int]] = []
        if sequence.num_computed % BLOCK_TOKENS:
            owners: set[int] = set()
            for table, parent in zip(beams, parents, strict=True):
                if parent not in owners:
                    owners.add(parent)
                    continue
                if not self.pool.can_allocate(1):
                    self._preempt(sequence)
                    return []
                (own,) = self.pool.allocate(1)
                copies.append((table[-1], own))
                self.pool.release(table[-1:])
                table[-1] = own
        return copies

    def _preempt_paused(self) -> bool:
        """Take the place and the blocks of a sequence whose reader has stalled; False where there is none."""
        stalled = next((s for s in self._running if s.is_paused), None)
        if stalled is not None:
            self._preempt(stalled)
        return stalled is not None

    def _preempt_of_most(self, sequence: Sequence, planned: dict[Sequence, int]) -> bool:
        """Take a place from the caller that has the most, if it has at least two more than the sequence's caller."""
        if not sequence.caller:
            return False
        nums = Counter(one.payer for one in self._running if one.caller)
        payer, most = max(nums.items(), key=lambda item: item[1], default=(sequence.payer, 0))
        if most < nums[sequence.payer] + 2:
            return False
        victim = next((one for one in reversed(self._running) if one.payer == payer and one.is_decoding), None)
        if victim is None:
            return False
        self._preempt(victim)
        planned.pop(victim, None)
        return True

    def _allocate(self, sequence: Sequence, planned: dict[Sequence, int]) -> None:
        """Give a running sequence the blocks for its planned rows.

        Whoever gives up its blocks for them loses its planned rows, which may be the sequence itself.
        """
        self.at_hand = sequence
        num_rows = planned[sequence] - sequence.num_unencoded
        num_blocks = sequence.num_new_blocks(num_rows)
        if num_blocks == 0:
            return
        while not self.pool.can_allocate(num_blocks):
            victim = next((s for s in reversed(self._running) if s.is_paused), self._running[-1])
            self._preempt(victim)
            planned.pop(victim, None)
            if victim is sequence:
                return
        sequence.take_blocks(self.pool.allocate(num_blocks), num_rows)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.is_running = False
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.give_blocks())
