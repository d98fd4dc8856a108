"""The sampler's rules against `transformers`' logits processors, and that a row never feels its batch."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from collegium.model.sampling import (
    SampleRow,
    SamplingParams,
    TokenCounts,
    UnusableLogitsError,
    draw,
    sample,
    token_logprobs,
)


def random_logits(num_rows: int, num_ids: int, seed: int = 0, spread: float = 2.5) -> torch.Tensor:
    return torch.randn(num_rows, num_ids, generator=torch.Generator().manual_seed(seed)) * spread


def row(position: int = 0, **fields: Any) -> SampleRow:
    names = ("choice_index", "tokens", "banned_ids", "num_logprobs")
    own = {name: fields.pop(name) for name in names if name in fields}
    return SampleRow(params=SamplingParams(**fields), position=position, **own)


def processed(scores: torch.Tensor, params: SamplingParams, seen_ids: Sequence[int] = ()) -> torch.Tensor:
    """Apply transformers' processors in the order of its generate: [1, V] to [1, V]."""
    ids = torch.tensor([list(seen_ids)], dtype=torch.int64)
    if params.repetition_penalty != 1 and seen_ids:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    return scores


def is_far_from_every_cut(scores: torch.Tensor, params: SamplingParams) -> bool:
    """Whether float32 rounding cannot move a token across top-p or min-p."""
    ranked = processed(scores, SamplingParams(temperature=params.temperature, top_k=params.top_k))
    probs = ranked.double().softmax(-1).sort(descending=True).values[0]
    top_p_gap = (probs.cumsum(-1) - params.top_p).abs().min() if params.top_p < 1 else 1
    min_p_gap = (probs / probs[0] - params.min_p).abs().min() if params.min_p else 1
    return bool(top_p_gap > 1e-5) and bool(min_p_gap > 1e-5)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 1000]),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
)


@settings(deadline=None, max_examples=150)
@given(params_strategy, st.integers(0, 10_000), st.integers(2, 60))
def test_draws_follow_the_distribution_that_transformers_processors_define(
    params: SamplingParams, seed: int, num_ids: int
) -> None:
    logits = random_logits(1, num_ids, seed)
    seen = [i % num_ids for i in range(0, 30, 7)]
    penalised = processed(logits, SamplingParams(temperature=1.0, repetition_penalty=params.repetition_penalty), seen)
    assume(is_far_from_every_cut(penalised, params))
    expected = processed(logits, params, seen).softmax(-1)[0].double().numpy()

    num_draws = 400  # evenly spread over [0, 1), so that counts are exact to one draw
    scores = penalised[0].numpy()
    counts = Counter(draw(scores, params, (i + 0.5) / num_draws) for i in range(num_draws))
    drawn = np.array([counts[i] for i in range(num_ids)]) / num_draws
    assert np.abs(drawn - expected).max() <= 1.5 / num_draws
    assert (expected[drawn > 0] > 0).all()

    penalised_by_us = sample(
        logits, [row(temperature=1e-9, repetition_penalty=params.repetition_penalty, tokens=TokenCounts(seen))]
    )
    assert penalised_by_us.token_ids == [int(penalised.argmax())]


@pytest.mark.parametrize("spread", [0.3, 2.5, 8.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.5),
        SamplingParams(temperature=0.8, top_p=0.95),
        SamplingParams(temperature=1.0, top_p=0.999),
        SamplingParams(temperature=1.0, min_p=0.05),
        SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01),
        SamplingParams(temperature=0.7, top_k=40),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.8),
        SamplingParams(temperature=0.7, top_k=1500, min_p=0.001),
    ],
    ids=lambda params: " ".join(
        f"{name}={getattr(params, name)}" for name in ("temperature", "top_k", "top_p", "min_p")
    ),
)
def test_large_vocabularies_follow_the_same_distribution(params: SamplingParams, spread: float) -> None:
    logits = random_logits(1, 20_011, seed=5, spread=spread)
    expected = processed(logits, params).softmax(-1)[0].double().numpy()
    num_draws = 500
    scores = logits[0].numpy()
    ids = [draw(scores, params, (i + 0.5) / num_draws) for i in range(num_draws)]
    assert scores[ids].min() >= scores[expected > 0].min() - 1e-4  # the cut itself may move by rounding
    heaviest = expected.argsort()[::-1][:50]
    drawn = np.array([ids.count(i) for i in heaviest]) / num_draws
    assert np.abs(drawn - expected[heaviest]).max() <= 1.5 / num_draws
    if params.top_k == 0:  # drawn in order of ids, so the share of each tenth of the vocabulary is exact as well
        tenths = np.bincount(np.array(ids) * 10 // len(expected), minlength=10) / num_draws
        exact = np.bincount(np.arange(len(expected)) * 10 // len(expected), expected)
        assert np.abs(tenths - exact).max() <= 1.5 / num_draws


@pytest.mark.parametrize("offset", [-3.0, -0.7, 0.7, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_is_exact_where_evenly_spaced_ids_are_unlike_the_others(top_p: float, offset: float) -> None:
    logits = random_logits(1, 20_480, spread=0.01)
    logits[0, ::10] += offset  # whoever guesses from every tenth id is misled
    params = SamplingParams(temperature=1.0, top_p=top_p)
    expected = processed(logits, params).softmax(-1)[0].double().numpy()
    ids = np.array([draw(logits[0].numpy(), params, (i + 0.5) / 300) for i in range(300)])
    share = expected[::10].sum()
    assert np.mean(ids % 10 == 0) == pytest.approx(share, abs=0.1)
    assert np.mean(expected[ids] > 0) >= 0.99  # rounding may move the cut by a token


@pytest.mark.parametrize("luck", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_a_token_without_probability_is_never_drawn(luck: float, top_k: int, top_p: float) -> None:
    scores = np.full(5000, -np.inf, np.float32)
    scores[[17, 2048, 4001]] = 1.0, 0.5, 0.9
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    assert draw(scores, params, luck) in (17, 2048, 4001)


@pytest.mark.parametrize("num_ids", [8, 6000])
def test_top_k_keeps_all_that_tie_with_the_last_and_top_p_the_lower_ids(num_ids: int) -> None:
    scores = np.zeros(num_ids, np.float32)
    assert {draw(scores, SamplingParams(temperature=1.0, top_k=2), luck) for luck in (0.0, 1 - 2**-53)} == {
        0,
        num_ids - 1,
    }
    half = [draw(scores, SamplingParams(temperature=1.0, top_p=0.5), luck) for luck in (0.0, 1 - 2**-53)]
    assert half[0] == 0 and abs(half[1] - (num_ids // 2 - 1)) <= num_ids // 500
    assert draw(scores, SamplingParams(temperature=1.0, top_p=1e-6), 0.999) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ids", [300, 20_000])
def test_a_row_alone_and_in_a_batch_of_32_gives_the_same_bits(num_ids: int, dtype: torch.dtype) -> None:
    logits = random_logits(32, num_ids, seed=1).to(dtype)
    tokens = TokenCounts(range(0, 200, 3), [5, 5, 9])
    rows = [
        row(
            position=i,
            choice_index=i % 3,
            seed=i * 977,
            temperature=(0.0, 0.7, 1.3)[i % 3],
            top_k=(0, 50, 1, 7)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            min_p=(0.0, 0.0, 0.01)[i % 3],
            repetition_penalty=(1.0, 1.2)[i % 2],
            frequency_penalty=(0.0, 0.5)[i // 2 % 2],
            tokens=tokens,
            banned_ids=(2,) if i % 5 == 0 else (),
            num_logprobs=(None, 0, 5)[i % 3],
        )
        for i in range(32)
    ]
    together = sample(logits, rows)
    for i in range(32):
        alone = sample(logits[i : i + 1], rows[i : i + 1])
        assert alone.token_ids == together.token_ids[i : i + 1]
        assert alone.logprobs == together.logprobs[i : i + 1]
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    assert sample(logits[shuffled], [rows[i] for i in shuffled]).token_ids == [together.token_ids[i] for i in shuffled]


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    logits = random_logits(4, 50_000)
    rows = [row(position=i, temperature=1.0, top_p=(1.0, 0.9)[i % 2], num_logprobs=3) for i in range(4)]
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            results.append(sample(logits, rows))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_drawn_tokens_pass_a_chi_square_test() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2]])
    expected = logits[0].softmax(-1).double().numpy() * 8000
    ids = []
    for start in range(0, 8000, 500):
        rows = [row(position=start + i, temperature=1.0, seed=1234) for i in range(500)]
        ids += sample(logits.expand(500, -1), rows).token_ids
    counts = np.bincount(ids, minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < 29.9  # 7 degrees of freedom, p = 1e-4


def test_greedy_takes_the_lowest_of_the_likeliest_ids() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-5.0, -4.0, -3.0]])
    assert sample(logits, [row()] * 3).token_ids == [1, 0, 2]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_even() -> None:
    logits = random_logits(1, 1000)
    best = int(logits.argmax())
    assert sample(logits, [row(temperature=1e-30)]).token_ids == [best]
    assert sample(logits, [row(temperature=1e-30, top_p=0.9)]).token_ids == [best]
    assert draw(logits[0].numpy(), SamplingParams(temperature=1e30), 0.5005) == 500


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0]])
    tokens = TokenCounts([0, 0, 3], [1, 1])
    assert sample(logits, [row(presence_penalty=2.0, tokens=tokens)]).token_ids == [0]  # 1.9 - 2
    assert sample(logits, [row(frequency_penalty=0.5, tokens=tokens)]).token_ids == [0]  # 1.9 - 1
    assert sample(logits, [row(frequency_penalty=-0.06, tokens=tokens)]).token_ids == [1]  # 1.9 + 0.12
    assert sample(logits, [row(repetition_penalty=2.5, tokens=tokens)]).token_ids == [2]  # 2 and 1.9 divided
    assert sample(logits, [row(repetition_penalty=0.5, presence_penalty=0.5, tokens=tokens)]).token_ids == [0]  # 4, 3.3


def test_extreme_penalties_stay_finite() -> None:
    logits = torch.tensor([[2e38, 1.0, -3e38]])
    tokens = TokenCounts([0, 2], [0])
    for penalty in (1e-30, 1e30):
        for temperature in (0.0, 1.0):
            fields = {"repetition_penalty": penalty, "temperature": temperature, "tokens": tokens}
            assert sample(logits, [row(**fields)]).token_ids in ([0], [1])


def test_penalties_without_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="token counts"):
        sample(random_logits(1, 8), [row(presence_penalty=1.0)])


def test_a_banned_id_is_never_chosen() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0]])
    assert sample(logits, [row(banned_ids=(0,))]).token_ids == [2]
    assert sample(logits, [row(banned_ids=(0, 2), temperature=1.0)]).token_ids == [1]
    assert logits[0, 0] == 5.0


def test_log_probabilities_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(3, 5000, spread=4.0)
    tokens = TokenCounts(range(5000))
    fields = {"repetition_penalty": 1.5, "temperature": 0.5, "banned_ids": (1,), "tokens": tokens}
    got = sample(logits, [row(num_logprobs=n, position=n, **fields) for n in (0, 1, 20)])
    expected = logits.log_softmax(-1)
    for r, num_top in enumerate((0, 1, 20)):
        logprobs = got.logprobs[r]
        assert logprobs is not None
        assert logprobs.chosen == pytest.approx(expected[r, got.token_ids[r]].item(), abs=2e-6)
        top = expected[r].topk(num_top)
        assert list(logprobs.top_ids) == top.indices.tolist()
        assert list(logprobs.top) == pytest.approx(top.values.tolist(), abs=2e-6)


def test_log_probabilities_of_given_tokens_equal_log_softmax() -> None:
    logits = random_logits(6, 400)
    ids = [0, 399, 5, 7, 7, 8]
    got = token_logprobs(logits, ids, 2)
    expected = logits.log_softmax(-1)
    assert [one.chosen for one in got] == pytest.approx(expected[range(6), ids].tolist(), abs=2e-6)
    assert [one.top_ids[0] for one in got] == logits.argmax(-1).tolist()


def test_tied_log_probabilities_name_the_lower_ids_first() -> None:
    (logprobs,) = token_logprobs(torch.zeros(1, 3000), [9], 4)
    assert logprobs.top_ids == (0, 1, 2, 3)
    assert logprobs.chosen == pytest.approx(-math.log(3000))


def test_more_top_log_probabilities_than_ids_give_all_ids() -> None:
    (logprobs,) = token_logprobs(torch.tensor([[0.0, 2.0, 1.0]]), [0], 20)
    assert logprobs.top_ids == (1, 2, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_name_their_rows(bad: float, temperature: float) -> None:
    logits = random_logits(4, 100)
    logits[1, 50] = logits[3, 0] = bad
    with pytest.raises(UnusableLogitsError, match="row 1, 3") as caught:
        sample(logits, [row(temperature=temperature)] * 4)
    assert caught.value.row_idxs == (1, 3)
    assert isinstance(caught.value, ValueError)


def test_a_row_that_bans_every_token_is_named() -> None:
    with pytest.raises(UnusableLogitsError, match="row 1"):
        sample(random_logits(2, 3), [row(), row(banned_ids=(0, 1, 2))])
    with pytest.raises(UnusableLogitsError, match="row 0"):
        sample(torch.full((1, 4), -math.inf), [row(temperature=1.0)])


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows do not fit"):
        sample(random_logits(3, 5), [row(), row()])


def test_an_empty_step_samples_nothing() -> None:
    assert sample(torch.empty(0, 5), []).token_ids == []


def test_logits_and_counts_are_not_modified() -> None:
    logits = random_logits(2, 6000)
    tokens = TokenCounts([1, 2], [3])
    before, counts = logits.clone(), tokens.counts[:3].copy()
    fields = {"temperature": 0.5, "top_p": 0.5, "repetition_penalty": 2.0, "banned_ids": (4,), "tokens": tokens}
    sample(logits, [row(**fields), row(temperature=1.0, top_p=0.2)])
    assert torch.equal(logits, before)
    assert (tokens.counts[:3] == counts).all()


@given(st.lists(st.integers(0, 300), max_size=200), st.lists(st.integers(0, 300), max_size=400), st.integers(0, 400))
def test_token_counts_equal_a_count_of_the_whole_text(prompt: list[int], output: list[int], num_known: int) -> None:
    tokens = TokenCounts(prompt, output[:num_known])
    for token_id in output[num_known:]:
        tokens.add(token_id)
    expected = dict.fromkeys(prompt, 0) | Counter(output)
    ids, counts = tokens.ids[: tokens.num_ids].tolist(), tokens.counts[: tokens.num_ids].tolist()
    assert dict(zip(ids, counts, strict=True)) == expected
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("num_ids", [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 600])
@pytest.mark.parametrize("num_prompt", [0, 1, 63, 64, 65])
def test_a_replay_of_any_number_of_distinct_ids_counts_as_if_each_was_added(num_ids: int, num_prompt: int) -> None:
    prompt, output = range(10_000, 10_000 + num_prompt), [*range(num_ids), *range(0, num_ids, 3)]
    replayed, grown = TokenCounts(prompt, output), TokenCounts(prompt)
    for token_id in output:
        grown.add(token_id)
    assert replayed.num_ids == grown.num_ids == num_prompt + num_ids
    counted = dict(zip(replayed.ids[: replayed.num_ids].tolist(), replayed.counts.tolist(), strict=False))
    assert counted == dict(zip(grown.ids[: grown.num_ids].tolist(), grown.counts.tolist(), strict=False))
    assert sum(counted.values()) == len(output)
    other = TokenCounts(prompt, output[::2], like=replayed)  # shares the prompt, and no count
    assert other._of_prompt is replayed._of_prompt
    apart = TokenCounts(prompt, output[::2])
    assert other.ids[: other.num_ids].tolist() == apart.ids[: apart.num_ids].tolist()
    assert other.counts[: other.num_ids].tolist() == apart.counts[: apart.num_ids].tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0),
        ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0), ("repetition_penalty", math.inf), ("presence_penalty", 2.1),
        ("presence_penalty", math.nan), ("frequency_penalty", -2.5), ("seed", -1), ("seed", 2**64),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_on_a_gpu_give_what_the_same_logits_give_on_the_cpu() -> None:
    logits = random_logits(6, 5000).to(torch.bfloat16)
    rows = [row(position=i, temperature=float(i % 2), top_k=i, num_logprobs=(None, 2)[i // 2 % 2]) for i in range(6)]
    assert sample(logits.cuda(), rows) == sample(logits, rows)
    assert sample(logits.cuda(), [row()] * 6) == sample(logits, [row()] * 6)
    logits[4, 7] = math.nan
    with pytest.raises(UnusableLogitsError, match="row 4"):
        sample(logits.cuda(), [row()] * 6)
