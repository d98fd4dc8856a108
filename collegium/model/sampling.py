"""Choose the next token of every row of a step.

Owns the rules: penalties, then temperature, top-k, top-p and min-p, in the order and with the meaning of
`transformers`' logits processors, and the log-probabilities of the raw distribution. Knows no sequences.
A row is worked on alone, by numpy over its vocabulary, so its result is bit for bit the same in any batch and on any
number of threads. Filters cut a fixed order (likelier first, lower id first among equals) that is never sorted as a
whole: a floor that provably keeps every survivor is found in one pass, and only what reaches it is sorted.
V vocabulary, B rows of a step, T positions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from collegium.model.philox import uniforms

Scores = NDArray[np.float32]

MIN_TEMPERATURE = 1e-6  # below it float32 differences overflow; any real margin is already decisive here
_CUM_BLOCK = 512  # two short cumulative sums instead of one over the vocabulary: 4 x faster at V = 152k
_SAMPLE_SIZE = 2048  # of the vocabulary, to guess where top-p ends: guesses right to a few per cent of the tail


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn. Raises ValueError that names the field."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]
    repetition_penalty: float = 1.0  # > 0, on tokens of prompt and output
    presence_penalty: float = 0.0  # in [-2, 2], once per token of the output
    frequency_penalty: float = 0.0  # in [-2, 2], per occurrence in the output
    seed: int = 0  # 64 bits
    no_repeat_ngram_size: int = 0  # 0: n-grams may repeat

    def __post_init__(self) -> None:
        for name, is_good, domain in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("seed", 0 <= self.seed < 2**64, "in [0, 2^64)"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, ">= 0"),
        ):
            value: float = getattr(self, name)
            if not (is_good and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and {domain}, but is {value}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the scores, so that a row must bring its TokenCounts."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class TokenCounts:
    """Which token ids a choice has seen, kept up to date so that a step costs only the distinct ids.

    `ids[:num_ids]`: distinct ids of prompt and output; `counts[:num_ids]`: how often each occurs in the output alone.
    """

    __slots__ = ("_of_prompt", "_slots", "counts", "ids")

    def __init__(
        self, prompt_ids: Iterable[int], output_ids: Iterable[int] = (), *, like: "TokenCounts | None" = None
    ) -> None:
        """`like`: those of another choice with the same prompt, which is then not read but shared."""
        if like is None:
            self._of_prompt: Mapping[int, int] = dict(zip(dict.fromkeys(prompt_ids), itertools.count(), strict=False))
        else:
            self._of_prompt = like._of_prompt
        self._slots: dict[int, int] = {}  # of ids that the prompt has not
        num_ids = len(self._of_prompt)
        self.ids = np.empty(num_ids + 64, np.int64)
        self.ids[:num_ids] = np.fromiter(self._of_prompt, np.int64, num_ids) if like is None else like.ids[:num_ids]
        self.counts = np.zeros(num_ids + 64, np.float32)
        for token_id, count in Counter(output_ids).items():
            self._add(token_id, count)

    @property
    def num_ids(self) -> int:
        """How many distinct ids have been seen."""
        return len(self._of_prompt) + len(self._slots)

    def add(self, token_id: int) -> None:
        """Count one more token of the output."""
        self._add(token_id, 1)

    def _add(self, token_id: int, count: int) -> None:
        slot = self._slot(token_id)  # first, since it may replace the array
        self.counts[slot] += count

    def _slot(self, token_id: int) -> int:
        slot = self._of_prompt.get(token_id, self._slots.get(token_id))
        if slot is None:
            slot = self.num_ids
            if slot == len(self.ids):
                self.ids = np.concatenate([self.ids, np.empty_like(self.ids)])
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self._slots[token_id] = slot
            self.ids[slot] = token_id
        return slot


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """What the sampler must know of one row of logits."""

    params: SamplingParams
    position: int  # index in the output of the token to draw
    choice_index: int = 0
    tokens: TokenCounts | None = None  # needed where params.has_penalties; not modified
    banned_ids: Sequence[int] = ()  # never chosen, for example the ends of sequence before min_tokens
    num_logprobs: int | None = None  # None: no log-probabilities; n: of the chosen token and of the n likeliest

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the raw logits is all that is asked for."""
        return (
            self.params.is_greedy
            and not self.params.has_penalties
            and not self.banned_ids
            and self.num_logprobs is None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probabilities in the raw distribution: before penalties, bans and temperature."""

    chosen: float
    top_ids: tuple[int, ...]  # likeliest first, the lower id first among equals
    top: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One token per row, and its log-probabilities where the row asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class UnusableLogitsError(ValueError):
    """Some rows have logits that no token can be chosen from; the others of the step are well."""

    def __init__(self, row_idxs: Sequence[int]) -> None:
        super().__init__(f"logits of row {', '.join(map(str, row_idxs))} are NaN, infinite or ban every token")
        self.row_idxs = tuple(row_idxs)


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose a token for each row.

    logits: [B, V] float32 or bfloat16 on any device, not modified. -inf marks a token that the model cannot produce.
    Raises UnusableLogitsError that names the rows with NaN, +inf or no token left.
    """
    if logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"{len(rows)} rows do not fit logits of shape {tuple(logits.shape)}")
    best = logits.argmax(dim=-1) if logits.device.type != "cpu" else None
    on_host = [r for r, row in enumerate(rows) if best is None or not row.is_plain]
    host: Scores = (logits if best is None else logits[on_host]).detach().to("cpu", torch.float32).numpy()
    if best is None:
        greedy = host.argmax(axis=-1)  # finds NaN first; [B] int64
        peaks = np.take_along_axis(host, greedy[:, None], axis=-1)[:, 0]
    else:
        greedy = best.cpu().numpy()
        peaks = logits.gather(-1, best[:, None])[:, 0].float().cpu().numpy()
    scores = dict(zip(on_host, host, strict=True))

    token_ids: list[int] = greedy.tolist()
    unusable: list[int] = np.flatnonzero(~np.isfinite(peaks)).tolist()
    drawn = [r for r, row in enumerate(rows) if not row.params.is_greedy]
    luck = dict(zip(drawn, uniforms([_draw_key(rows[r]) for r in drawn]).tolist(), strict=True)) if drawn else {}
    for r, row in enumerate(rows):
        if row.is_plain or r in unusable:
            continue
        adjusted = _adjust(scores[r], row)
        if not np.isfinite(adjusted.max()):
            unusable.append(r)
        elif row.params.is_greedy:
            token_ids[r] = int(adjusted.argmax())
        else:
            token_ids[r] = draw(adjusted, row.params, luck[r])
    if unusable:
        raise UnusableLogitsError(sorted(unusable))
    logprobs = [
        None if row.num_logprobs is None else _logprobs(scores[r], token_ids[r], row.num_logprobs)
        for r, row in enumerate(rows)
    ]
    return Sampled(token_ids=token_ids, logprobs=logprobs)


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: int = 0) -> list[TokenLogprobs]:
    """Return the log-probabilities of given tokens: logits [T, V] on any device, token_ids [T]."""
    host: Scores = logits.detach().to("cpu", torch.float32).numpy()
    return [_logprobs(scores, token_id, num_top) for scores, token_id in zip(host, token_ids, strict=True)]


def draw(scores: Scores, params: SamplingParams, luck: float) -> int:
    """Draw from scores [V], whose maximum is finite: temperature, filters, then the inverse CDF at luck in [0, 1)."""
    temperature = max(params.temperature, MIN_TEMPERATURE)
    if 0 < params.top_k < len(scores):
        return _draw_by_rank(scores, _top_scores(scores, params.top_k), temperature, params, luck)
    weights = _weights(scores, temperature)
    least = params.min_p  # the likeliest token weighs 1; what min-p drops still counts in the total of top-p
    if params.top_p < 1:
        least = max(least, _drop_tail(weights, params.top_p))
    if least > 0:
        weights *= weights >= least
    return _draw_by_id(weights, luck)


def _draw_key(row: SampleRow) -> tuple[int, int, int]:
    return row.params.seed, row.choice_index, row.position


def _adjust(scores: Scores, row: SampleRow) -> Scores:
    """Apply penalties and bans: to a copy where there are any."""
    if not (row.params.has_penalties or row.banned_ids):
        return scores
    scores = scores.copy()
    if row.params.has_penalties:
        if row.tokens is None:
            raise ValueError("a row with penalties needs its token counts")
        ids, counts = row.tokens.ids[: row.tokens.num_ids], row.tokens.counts[: row.tokens.num_ids]
        penalty = np.float64(np.float32(row.params.repetition_penalty))
        seen = scores[ids].astype(np.float64)
        seen = np.where(seen < 0, seen * penalty, seen / penalty)
        seen -= row.params.frequency_penalty * counts + row.params.presence_penalty * (counts > 0)
        limit = np.finfo(np.float32).max
        scores[ids] = np.where(np.isneginf(seen), seen, np.clip(seen, -limit, limit))
    scores[list(row.banned_ids)] = -np.inf
    return scores


def _weights(scores: Scores, temperature: float) -> Scores:
    """Return probabilities relative to the likeliest token's: [V] in [0, 1]."""
    with np.errstate(over="ignore"):  # a difference below every float32 weighs nothing
        weights = scores - scores.max()
        weights /= np.float32(temperature)
        return np.exp(weights, out=weights)


def _draw_by_rank(scores: Scores, ranked: Scores, temperature: float, params: SamplingParams, luck: float) -> int:
    """Draw one of the ranked scores (descending, [K]) after top-p and min-p; return its id."""
    weights = np.exp((ranked.astype(np.float64) - np.float64(ranked[0])) / temperature)
    cum = np.cumsum(weights)
    num_kept = len(ranked)
    if params.top_p < 1:  # keep a token while those before it hold less than top_p
        num_kept = min(num_kept, int(cum.searchsorted(params.top_p * float(cum[-1]), side="left")) + 1)
    if params.min_p > 0:
        num_kept = min(num_kept, int(np.count_nonzero(weights >= params.min_p)))
    rank = _pick(cum[:num_kept], luck)
    first = int(np.flatnonzero(ranked[: rank + 1] == ranked[rank])[0])
    return int(np.flatnonzero(scores == ranked[rank])[rank - first])


def _drop_tail(weights: Scores, top_p: float) -> float:
    """Find the least weight that top-p keeps; where only some of its equals are kept, zero the others in place.

    The lightest tokens are dropped while together they hold at most 1 - top_p. Where that ends is estimated from a
    sample of the vocabulary, bracketed by sums over all of it, and only what lies in the bracket is sorted.
    """
    spare = (1 - top_p) * float(weights.sum())
    low, high, dropped = 0.0, math.inf, 0.0
    if (stride := len(weights) // _SAMPLE_SIZE) > 1:
        sample = np.sort(weights[::stride])
        estimate: NDArray[np.float64] = np.cumsum(sample, dtype=np.float64) * stride
        near, far = np.searchsorted(estimate, [0.8 * spare, 1.25 * spare])
        low, high = float(sample[max(near - 8, 0)]), float(sample[min(far + 8, len(sample) - 1)])
        dropped = _mass_below(weights, low)
        if dropped > spare:
            low, dropped = 0.0, 0.0
        if _mass_below(weights, high) <= spare:
            high = math.inf
    bracket = np.sort(weights[(weights >= low) & (weights < high)])
    cum: NDArray[np.float64] = np.cumsum(bracket, dtype=np.float64) + dropped
    num_dropped = min(int(cum.searchsorted(spare, side="right")), len(bracket) - 1)
    least = float(bracket[num_dropped])
    first = int(bracket.searchsorted(least, side="left"))
    if least > 0 and num_dropped > first:
        weights[np.flatnonzero(weights == least)[first - num_dropped :]] = 0
    return least


def _mass_below(weights: Scores, limit: float) -> float:
    return float((weights * (weights < limit)).sum())  # a product takes a tenth of the time of a selection


def _draw_by_id(weights: Scores, luck: float) -> int:
    """Draw an id with probability proportional to its weight."""
    block_cum: NDArray[np.float64] = np.cumsum(
        np.add.reduceat(weights, np.arange(0, len(weights), _CUM_BLOCK)), dtype=np.float64
    )
    block = _pick(block_cum, luck)
    before = block_cum[block - 1] if block else 0.0
    rest = (luck * block_cum[-1] - before) / (block_cum[block] - before)  # uniform in [0, 1) within the block
    start = block * _CUM_BLOCK
    cum: NDArray[np.float64] = np.cumsum(weights[start : start + _CUM_BLOCK], dtype=np.float64)
    return start + _pick(cum, rest)


def _pick(cum: NDArray[np.float64], luck: float) -> int:
    """Return the first index whose cumulative weight exceeds luck's share; never one without weight."""
    last = int(cum.searchsorted(float(cum[-1]), side="left"))
    return min(last, int(cum.searchsorted(luck * float(cum[-1]), side="right")))


def _top_scores(scores: Scores, num_top: int) -> Scores:
    """Return the num_top highest scores and all that equal the last of them, descending.

    The vocabulary is folded into columns; the num_top-th highest column maximum is a floor that num_top scores reach.
    """
    num_top = min(num_top, len(scores))
    num_columns = max(8 * num_top, 512)
    if len(scores) >= 4 * num_columns:
        width = len(scores) // num_columns
        maxima = scores[: width * num_columns].reshape(width, num_columns).max(axis=0)
        floor = np.partition(maxima, num_columns - num_top)[num_columns - num_top]
        scores = scores[scores >= floor]
    ranked: Scores = np.sort(scores)[::-1]
    return ranked[: int((-ranked).searchsorted(-float(ranked[num_top - 1]), side="right"))]


def _logprobs(scores: Scores, token_id: int, num_top: int) -> TokenLogprobs:
    """Return log-probabilities under softmax(scores)."""
    peak = scores.max()
    norm = float(peak) + math.log(float(np.exp(scores - peak).sum(dtype=np.float64)))
    top_ids: NDArray[np.int64] = np.empty(0, np.int64)
    if num_top:
        top_ids = np.flatnonzero(scores >= _top_scores(scores, num_top)[-1])
        top_ids = top_ids[np.lexsort((top_ids, -scores[top_ids]))][:num_top]
    return TokenLogprobs(
        chosen=float(scores[token_id]) - norm,
        top_ids=tuple(top_ids.tolist()),
        top=tuple((scores[top_ids].astype(np.float64) - norm).tolist()),
    )
