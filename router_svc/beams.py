"""Beam search over one request: its live beams, what has ended, and when nothing better can come.

Owns the choice among continuations. The rules are those of `generate` of transformers 5.23 (its vectorised search);
scores are sums of the model's own log-probabilities, and bans do not renormalise them. Knows neither blocks nor steps.
W live beams, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

EarlyStopping = Literal["never"] | bool
_NOWHERE = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamOptions:
    """How a request is searched. num_return: the best that are told of, at most num_beams."""

    num_beams: int
    num_return: int = 1
    length_penalty: float = 1.0  # a hypothesis' score is its sum over its length to this power
    early_stopping: EarlyStopping = False


@dataclass(slots=True, kw_only=True)
class Hypothesis:
    """Tokens of an output, and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]
    total: float  # sum of logprobs
    score: float = _NOWHERE  # once it has ended
    has_ended: bool = False


@dataclass(slots=True, kw_only=True)
class Beam:
    """A live one, and the blocks of its sequence."""

    tokens: Hypothesis
    blocks: list[int] = field(default_factory=list)


class BeamSearch:
    """One request's. Until the first tokens are chosen it has no beams: the prompt is one sequence's."""

    def __init__(self, options: BeamOptions, begun: Seq[int] = ()):
        """begun: what every output begins with, at log-probability 0."""
        self.options = options
        self.beams: list[Beam] = []
        self.is_over = False
        self._begun = Hypothesis(token_ids=list(begun), logprobs=[0.0] * len(begun), total=0.0)
        self._best = [Hypothesis(token_ids=[], logprobs=[], total=0.0) for _ in range(options.num_beams)]
        self._can_improve = True

    @property
    def width(self) -> int:
        """Rows of a position."""
        return len(self.beams) or 1

    @property
    def results(self) -> list[Hypothesis]:
        """The best that have ended, best first."""
        return [one for one in self._best[: self.options.num_return] if one.has_ended]

    def advance(
        self, logits: Tensor, banned: Seq[Seq[int]], ending_ids: frozenset[int], max_tokens: int
    ) -> list[tuple[int, Hypothesis]]:
        """Choose by logits [W, V]: the next beams, as (the beam that each goes on from, its tokens). None: it is over.

        banned: ids that each beam must not go on with. The beams' blocks are the caller's to set.
        """
        options = self.options
        before = [beam.tokens for beam in self.beams] or [self._begun]
        raw = logits.float().log_softmax(-1)
        scores = raw.clone()
        for row, ids in enumerate(banned):
            if ids:
                scores[row, list(ids)] = float("-inf")
        scores += torch.tensor([one.total for one in before])[:, None]
        num_kept = max(2, 1 + len(ending_ids)) * options.num_beams
        top = scores.flatten().topk(min(num_kept, scores.numel()))
        length = len(before[0].token_ids) + 1
        is_last = length >= max_tokens
        going_on: list[tuple[int, Hypothesis]] = []
        ended: list[Hypothesis] = []
        for rank, (total, at) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            if total == _NOWHERE or (rank >= options.num_beams <= len(going_on)):
                break
            parent, token = divmod(at, scores.shape[1])
            is_end = is_last or token in ending_ids
            if len(going_on) == options.num_beams if not is_end else rank >= options.num_beams:
                continue
            one = Hypothesis(
                token_ids=[*before[parent].token_ids, token],
                logprobs=[*before[parent].logprobs, float(raw[parent, token])],
                total=total,
            )
            if is_end:
                ended.append(one)
            else:
                going_on.append((parent, one))
        if not (going_on or ended):  # every token is banned: what there is cannot be longer
            ended, length = before, length - 1
        self._end(ended, max(1, length))
        best = going_on[0][1].total if going_on else _NOWHERE
        self._judge(best, length, max_tokens)
        is_full = all(one.has_ended for one in self._best) and options.early_stopping is True
        self.is_over = not going_on or is_full or not self._can_improve
        return [] if self.is_over else going_on

    def _end(self, ended: Seq[Hypothesis], length: int) -> None:
        """Keep the best of what has ended, if that may still matter."""
        is_full = all(one.has_ended for one in self._best) and self.options.early_stopping is True
        if is_full or not self._can_improve:
            return
        for one in ended:
            one.score, one.has_ended = one.total / length**self.options.length_penalty, True
        self._best = sorted([*self._best, *ended], key=lambda one: -one.score)[: self.options.num_beams]

    def _judge(self, best_total: float, length: int, max_tokens: int) -> None:
        """Say whether a live beam may become better than the worst that has ended."""
        penalty = self.options.length_penalty
        at = max_tokens if self.options.early_stopping == "never" and penalty > 0 else length
        possible = best_total / at**penalty
        worst = min(one.score for one in self._best)
        self._can_improve &= any(possible > (worst if one.has_ended else _NOWHERE) for one in self._best)


def ngram_bans(tokens: Seq[int], size: int) -> list[int]:
    """Ids that would make an n-gram of so many tokens a second time. Takes time in proportion to both."""
    if not size or len(tokens) < size:
        return []
    ids = np.array(tokens)
    num = len(ids) - size + 1
    found = np.ones(num, bool)  # by where it begins, whether what came before is what the tokens end with
    for at in range(size - 1):
        found &= ids[at : at + num] == ids[num + at]
    return sorted(set(ids[size - 1 :][found].tolist()))
