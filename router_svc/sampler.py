"""Draw a step's tokens, and take what its logits say of prompts that are scored.

Owns nothing that lasts: counts for penalties are kept with their sequence. A sequence for which drawing fails is found
by halves, and ends alone.
"""

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

from collegium.model.sampling import SampleRow, TokenCounts, TokenLogprobs, UnusableLogitsError, sample, token_logprobs
from router_svc.beams import Beam, BeamSearch
from router_svc.failures import UNUSABLE_LOGITS, Failure
from router_svc.news import NewsBoard
from router_svc.requests import Requests
from router_svc.sequence import Finish, Sequence
from router_svc.step import Row, Step
from router_svc.step_faults import StepFaults
from router_svc.step_logits import StepLogits
from router_svc.totals import EngineTotals


class Ends(Protocol):
    """Whoever ends sequences."""

    def end(self, sequence: Sequence, finish: Finish | None, failure: Failure | None = None) -> None:
        """End a sequence, with a finish or with a failure."""
        ...

    def spoil(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence for which something failed that is no other's."""
        ...


class Sampler:
    """Owned by the engine's thread."""

    def __init__(
        self,
        requests: Requests,
        news: NewsBoard,
        ends: Ends,
        faults: StepFaults,
        totals: EngineTotals,
        *,
        fork: Callable[[Sequence, Seq[int], Seq[list[int]]], None],
    ):
        """fork: has a sequence's beams go on from the blocks of those before them."""
        self._fork = fork
        self._requests, self._news, self._ends, self._faults, self._totals = requests, news, ends, faults, totals

    def sample(self, step: Step, logits: StepLogits) -> None:
        """Take what the logits of a committed step say: scores of prompts, and a token for each row at its end."""
        for row in step.rows:
            if row.sequence.is_score and not row.sequence.has_ended:
                try:
                    self._score(row, logits)
                except Exception as error:
                    self._ends.spoil(row.sequence, error)
        due = dict.fromkeys(
            row.sequence
            for row in step.rows
            if row.reaches_end and not (row.sequence.is_score or row.sequence.has_ended)
        )
        self._draw([sequence for sequence in due if sequence.beams is None], logits)
        for sequence in due:
            if sequence.beams is not None:
                try:
                    self._search(sequence, sequence.beams, logits)
                except Exception as error:
                    self._ends.spoil(sequence, error)

    def _draw(self, sequences: list[Sequence], logits: StepLogits) -> None:
        """Draw a token for each sequence; sequences for which that fails are tried by halves."""
        if not sequences:
            return
        try:
            sampled = sample(logits.of(sequences), [self._sample_row(sequence) for sequence in sequences])
        except UnusableLogitsError as error:
            for idx in error.row_idxs:
                self._ends.end(sequences[idx], None, UNUSABLE_LOGITS)
            self._draw([one for idx, one in enumerate(sequences) if idx not in error.row_idxs], logits)
            return
        except Exception as error:
            if len(sequences) == 1:
                self._ends.spoil(sequences[0], error)
                return
            self._faults.tell(num_rows=len(sequences))
            middle = len(sequences) // 2
            self._draw(sequences[:middle], logits)
            self._draw(sequences[middle:], logits)
            return
        for sequence, token, logprobs in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            try:
                self._take(sequence, token, logprobs)
            except Exception as error:
                self._ends.spoil(sequence, error)

    def _search(self, sequence: Sequence, search: BeamSearch, logits: StepLogits) -> None:
        """Choose the next beams of a sequence; at its end, tell what has been found."""
        begin, end = logits.spans[sequence]
        rows = logits.logits[begin:end].cpu()
        if not bool(rows.isfinite().all()):
            self._ends.end(sequence, None, UNUSABLE_LOGITS)
            return
        outputs = [beam.tokens.token_ids for beam in search.beams] or [sequence.output_ids]
        banned = [sequence.banned_ids(one) for one in outputs]
        tables = sequence.tables
        chosen = search.advance(rows, banned, sequence.rules.ending_ids, sequence.rules.max_tokens)
        self._totals.generated_tokens += len(chosen) or 1
        if sequence.life is not None:
            sequence.life.token()
        if search.is_over:
            self._tell_best(sequence, search)
            return
        search.beams = [Beam(tokens=tokens) for _, tokens in chosen]
        sequence.blocks = []
        sequence.output_ids = list(search.beams[0].tokens.token_ids)
        self._fork(sequence, [parent for parent, _ in chosen], tables)

    def _tell_best(self, sequence: Sequence, search: BeamSearch) -> None:
        ending = sequence.rules.ending_ids
        for one, found in itertools.zip_longest((sequence, *sequence.best), search.results):
            if one is None:
                break
            news = self._news.tell(one)
            one.forced = []
            if found is not None:
                one.output_ids, one.score = found.token_ids, found.score
                news.token_ids += found.token_ids
                if one.num_logprobs is not None:
                    news.logprobs += [TokenLogprobs(chosen=value, top_ids=(), top=()) for value in found.logprobs]
            last = one.output_ids[-1] if one.output_ids else -1
            one.finish = Finish.STOP if last in ending else Finish.LENGTH
            one.stop_id = last if last in ending else None
        for one in (*sequence.best, sequence):
            self._ends.end(one, one.finish)

    def _take(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        sequence.append(token)
        if sequence.life is not None:
            sequence.life.token()
        if sequence.counts is not None:
            sequence.counts.add(token)
        self._totals.generated_tokens += 1
        news = self._news.tell(sequence)
        news.tell_forced()
        news.token_ids.append(token)
        if logprobs is not None:
            news.logprobs.append(logprobs)
        if sequence.has_ended:
            self._ends.end(sequence, sequence.finish)

    def _score(self, row: Row, logits: StepLogits) -> None:
        sequence = row.sequence
        begin, end = logits.spans[sequence]
        nexts = sequence.prompt_ids[row.begin + 1 : row.end + 1]
        skip = max(0, sequence.num_scored - row.begin)
        if nexts[skip:]:
            scored = token_logprobs(logits.logits[begin + skip : end], nexts[skip:], sequence.num_logprobs or 0)
            if any(math.isnan(one.chosen) for one in scored):
                self._ends.end(sequence, None, UNUSABLE_LOGITS)
                return
            self._news.tell(sequence).logprobs += scored
            sequence.num_scored = row.begin + len(nexts)
        if row.reaches_end:
            self._ends.end(sequence, Finish.STOP)

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        return SampleRow(
            params=sequence.sampling,
            position=len(sequence.output_ids),
            choice_index=sequence.choice_index,
            tokens=self._counts_of(sequence) if sequence.sampling.has_penalties else None,
            banned_ids=sequence.banned_ids(),
            num_logprobs=sequence.num_logprobs,
        )

    def _counts_of(self, sequence: Sequence) -> TokenCounts:
        """Find or make the counts of a sequence. What a prompt costs in them, its choices share."""
        if sequence.counts is None:
            siblings = self._requests.of(sequence.owner, sequence.request_id)
            like = next((one.counts for one in siblings if one.counts is not None), None)
            sequence.counts = TokenCounts(sequence.prompt_ids, sequence.output_ids, like=like)
        return sequence.counts
